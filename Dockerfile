# One image for every service: docker build -t tidewire . && docker run tidewire gateway my_app:app --redis redis://…
# Applications are found in /app: mount one there, or build an image FROM this one that copies it in.
ARG PYTHON_VERSION=3.13

FROM python:${PYTHON_VERSION}-slim AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
RUN pip install build && python -m venv /opt/tidewire
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY tidewire tidewire
COPY services services
COPY examples examples
RUN python -m build --wheel --outdir /dist && /opt/tidewire/bin/pip install /dist/*.whl

FROM python:${PYTHON_VERSION}-slim
RUN useradd --system --uid 10001 --create-home --home-dir /app tidewire
COPY --from=build /opt/tidewire /opt/tidewire
COPY deploy/healthcheck.py /opt/healthcheck.py
ENV PATH=/opt/tidewire/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    TIDEWIRE_HOST=0.0.0.0 \
    TIDEWIRE_LOG_FORMAT=json
WORKDIR /app
USER tidewire
# Websockets, HTTP, and the admin port with probes and metrics.
EXPOSE 8080 8081 8090
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s CMD ["python", "/opt/healthcheck.py", "/livez"]
ENTRYPOINT ["tidewire"]
CMD ["--help"]
