# The CPU image by default. For NVIDIA GPUs build on NVIDIA's TensorRT image, see docs/docker.md.
ARG BASE=python:3.11-slim
FROM ${BASE}

ARG EXTRAS=ov,tvm,trt

COPY pyproject.toml README.md LICENSE /src/
COPY auditor /src/auditor
COPY backends /src/backends
COPY reports /src/reports

# The environment sees the base image's packages, so that its TensorRT is used where it has one;
# without a pip of its own it needs no ensurepip, which some base images lack.
RUN python3 -m venv --system-site-packages --without-pip /opt/auditor \
    && python3 -m pip --python /opt/auditor/bin/python install --no-cache-dir "/src[${EXTRAS}]" \
    && rm -r /src \
    && /opt/auditor/bin/audit --help > /dev/null \
    && useradd --uid 10001 auditor

# A home that any user given to `docker run --user` can write to: TVM does not load without one.
ENV HOME=/tmp PATH=/opt/auditor/bin:$PATH
USER 10001
WORKDIR /data
ENTRYPOINT ["audit"]
CMD ["--help"]
