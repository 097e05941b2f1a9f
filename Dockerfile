# A server with one model in it, which needs no network to run:
#   docker build -t opsin .
#   docker build -t opsin-large --build-arg MODEL=google/vit-large-patch16-224 .
#   docker run -p 127.0.0.1:8000:8000 opsin
# Behind a mirror of the hub: --build-arg HF_ENDPOINT=https://…; of PyPI: --build-arg PIP_INDEX_URL=https://…
FROM python:3.11-slim AS build

ARG PIP_INDEX_URL=https://pypi.org/simple
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/opsin
ENV PATH=/opt/opsin/bin:$PATH
WORKDIR /src
# torch for CPUs alone is a tenth of the one with CUDA, and stays in the cache of layers when the source changes
COPY constraints.txt ./
RUN pip install --constraint constraints.txt --index-url "$TORCH_INDEX_URL" --extra-index-url "$PIP_INDEX_URL" torch
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
RUN pip install --constraint constraints.txt ".[serve]"

ARG MODEL=opsin/vit-tiny
ARG HF_ENDPOINT=https://huggingface.co
ENV HF_HOME=/opt/models
RUN mkdir -p "$HF_HOME" && python -c "import sys, opsin; print(opsin.load(sys.argv[1]))" "$MODEL"


FROM python:3.11-slim

RUN useradd --uid 10001 --user-group --no-create-home --shell /usr/sbin/nologin opsin
COPY --from=build /opt/opsin /opt/opsin
COPY --from=build /opt/models /opt/models

ARG MODEL=opsin/vit-tiny
# every flag of `opsin serve` is a variable: OPSIN_SERVE_API_KEY, OPSIN_SERVE_WORKERS, …
ENV PATH=/opt/opsin/bin:$PATH PYTHONUNBUFFERED=1 HOME=/tmp \
    HF_HOME=/opt/models HF_HUB_OFFLINE=1 OPSIN_SERVE_MODEL=$MODEL
USER 10001:10001
WORKDIR /tmp
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --start-interval=1s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
# without a shell in between, SIGTERM reaches the server: it answers what it has taken, and ends
STOPSIGNAL SIGTERM
CMD ["opsin", "serve", "--host", "0.0.0.0", "--port", "8000"]
