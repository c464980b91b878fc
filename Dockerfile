# The service of a model folder, as a user without rights. docker build -t cprec [--build-arg TORCH_INDEX=URL] .
# The model and its changes of items are mounted, not built in; compose.yaml shows how.
FROM python:3.11.13-slim-bookworm AS build
WORKDIR /src
RUN python -m venv /opt/cprec
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY src ./src
# An index beside the usual one to take PyTorch from: its own for CPU builds makes the image a fifth of the size.
ARG TORCH_INDEX=
RUN /opt/cprec/bin/pip install --no-cache-dir --constraint constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} torch \
 && /opt/cprec/bin/pip install --no-cache-dir --constraint constraints.txt '.[serve]'

FROM python:3.11.13-slim-bookworm
RUN useradd --uid 10001 --create-home cprec && install --directory --owner cprec /state
COPY --from=build /opt/cprec /opt/cprec
USER 10001
ENV PATH=/opt/cprec/bin:$PATH HF_HUB_OFFLINE=1 CPREC_PROGRESS=plain PYTHONUNBUFFERED=1
EXPOSE 8080
VOLUME /state
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
  CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8080/health', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["cprec", "serve"]
CMD ["/model", "host=0.0.0.0", "port=8080", "state=/state"]
