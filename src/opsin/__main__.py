"""The command: `opsin`, or `python -m opsin`."""

import gc


def main() -> None:
    # Importing torch makes half a million objects that stay. Looking through them for garbage, again and again on the
    # way in and at the exit, takes half a second.
    gc.set_threshold(100_000)
    from opsin.cli import main as command

    try:
        command(prog_name="opsin")
    finally:
        gc.freeze()


if __name__ == "__main__":
    main()
