# Runs `make train` on a CPU; what was trained is then in out/:
#     docker build -t trl-quietstar . && docker run --rm -v "$PWD/out:/trl-quietstar/.demo/out" trl-quietstar
FROM python:3.12-slim

# a compiler, for packages without a wheel for this platform
RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential \
    && rm -rf /var/lib/apt/lists/*

# PyTorch without CUDA
ENV PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu PIP_NO_CACHE_DIR=1

# the environment first: a change of other files does not install it again
WORKDIR /trl-quietstar
COPY pyproject.toml setup.py README.md LICENSE Makefile ./
COPY trl_quietstar trl_quietstar
COPY recipes recipes
RUN make .venv/demo

# whatever the times of the files that come, nothing is to be installed again
COPY . .
RUN touch .venv/dev && touch .venv/demo && make demo-data

CMD ["make", "train"]
