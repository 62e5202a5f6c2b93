# Two images of one source: `docker build --target cpu` and `docker build --target cuda` (the default).
# The base has an exact tag; add its digest where your registry's mirror tells you one.
FROM python:3.11.13-slim-bookworm AS base
ENV PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    PATH=/opt/venv/bin:$PATH

# Packages are installed where compilers and caches may lie about; the images get the result alone.
FROM base AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    DS_BUILD_OPS=0
WORKDIR /src
COPY constraints.txt ./
RUN python -m venv /opt/venv && \
    python -m pip install "pip>=24" "setuptools>=77" wheel -c constraints.txt

# torch comes first and by itself: nothing after it can then pull another build.
FROM build AS build-cpu
RUN version=$(sed -n 's/^torch==//p' constraints.txt) && \
    python -m pip install -c constraints.txt "torch==$version+cpu" \
        --extra-index-url https://download.pytorch.org/whl/cpu
COPY . ./
RUN python -m pip install -c constraints.txt ".[all]" && python -m pip check

FROM build AS build-cuda
RUN version=$(sed -n 's/^torch==//p' constraints.txt) && \
    python -m pip install -c constraints.txt "torch==$version"
COPY . ./
RUN python -m pip install -c constraints.txt ".[all]" && python -m pip check

# Any other user works as well, such as the one whose files are on the claim: nothing in the image belongs to one.
FROM base AS runtime
# Triton compiles a small C file for each kernel, and torch its own.
# hadolint ignore=DL3008
RUN apt-get update && \
    apt-get install --yes --no-install-recommends gcc g++ libc6-dev && \
    rm -rf /var/lib/apt/lists/* && \
    groupadd --gid 10001 titans && \
    useradd --uid 10001 --gid 10001 --create-home titans && \
    mkdir /workspace && \
    chown titans:titans /workspace
WORKDIR /workspace

FROM runtime AS cpu
COPY --from=build-cpu /opt/venv /opt/venv
USER 10001:10001
CMD ["titans-dist", "--help"]

FROM runtime AS cuda
# NCCL finds InfiniBand and RoCE through these.
# hadolint ignore=DL3008
RUN apt-get update && \
    apt-get install --yes --no-install-recommends libibverbs1 ibverbs-providers librdmacm1 && \
    rm -rf /var/lib/apt/lists/*
COPY --from=build-cuda /opt/venv /opt/venv
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
CMD ["titans-dist", "--help"]
