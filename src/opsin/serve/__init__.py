"""HTTP: images in a request → labels, embeddings, maps.

settings.py    what a server is told
refusals.py    every answer that is not a result
app.py         the application, put together
guard.py       limits, keys, ids, log: before a request is read
intake.py      a request → images → answers: what the protocols share
fetch.py       an image behind a URL, if its host is allowed
huggingface.py open_inference.py openai.py classify.py    one protocol each
inspect.py     what the page asks: maps of attention
fleet.py       the models: loaded, found, unloaded
batching.py    a model's queue and thread
metrics.py     /metrics
run.py         the server's process: workers, signals
page/          the page
"""
