# The checkout and its environment. PyTorch's packages hold CUDA themselves, so any base image will do
# that has Python 3.11 to 3.13, or Debian's packages to install it from:
#   docker build --build-arg TORCH=cpu --tag cifarlab .
#   docker build --build-arg BASE=nvidia/cuda:13.0.1-base-ubuntu24.04 --tag cifarlab:cuda .
ARG BASE=python:3.12-slim
FROM ${BASE}
# cpu, or nothing for CUDA
ARG TORCH=""

# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates git make \
    && { command -v python3 || apt-get install --yes --no-install-recommends python3-venv; } \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 cifarlab \
    && install --directory --owner=10001 /work

USER 10001
WORKDIR /work
# This layer is made anew only if a version changes, and not with every change of the code.
COPY --chown=10001 Makefile requirements.txt ./
COPY --chown=10001 bench/install.py bench/
RUN make .venv/.requirements TORCH="${TORCH}"

COPY --chown=10001 . .
RUN make setup
ENV PATH="/work/.venv/bin:${PATH}"
CMD ["make", "help"]
