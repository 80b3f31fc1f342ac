# The CPU image by default. For NVIDIA GPUs build on NVIDIA's TensorRT image, see docs/docker.md.
ARG BASE=python:3.11-slim

# Every package is one of those in locks/, by its hash; what builds wheels stays in this stage.
FROM ${BASE} AS wheels
ARG EXTRAS=ov,tvm,trt
WORKDIR /src
COPY locks locks
RUN python3 -m venv --system-site-packages --without-pip /build \
    && python3 -m pip --python /build/bin/python install --no-cache-dir --require-hashes -r locks/build.txt
COPY pyproject.toml README.md LICENSE ./
COPY auditor auditor
COPY backends backends
COPY reports reports
RUN for name in base $(echo "${EXTRAS}" | tr , " "); do \
        python3 -m pip --python /build/bin/python wheel --no-cache-dir --require-hashes --no-deps \
            --no-build-isolation --wheel-dir /wheels -r "locks/${name}.txt" || exit 1; \
    done \
    && python3 -m pip --python /build/bin/python wheel --no-deps --no-build-isolation \
        --wheel-dir /wheels .

FROM ${BASE}
# The environment sees the base image's packages, so that its TensorRT is used where it has one;
# without a pip of its own it needs no ensurepip, which some base images lack.
RUN --mount=from=wheels,source=/wheels,target=/wheels \
    python3 -m venv --system-site-packages --without-pip /opt/auditor \
    && python3 -m pip --python /opt/auditor/bin/python install --no-cache-dir --no-index --no-deps \
        --ignore-installed /wheels/*.whl \
    && /opt/auditor/bin/audit --help > /dev/null \
    && useradd --uid 10001 auditor

# A home that any user given to `docker run --user` can write to: TVM does not load without one.
ENV HOME=/tmp PATH=/opt/auditor/bin:$PATH
USER 10001
WORKDIR /data
ENTRYPOINT ["audit"]
CMD ["--help"]
