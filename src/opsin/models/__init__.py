"""pixels → tokens → logits. Plain torch; nothing here knows a file format, an engine or a server."""
