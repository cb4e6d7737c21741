# moka in a container.
#   docker build -t moka .                                                                             CPU
#   docker build -t moka --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .              CUDA
#   docker run --rm -v "$PWD:/work" moka train quickstart
#   docker run --rm -v "$PWD:/work" -p 8000:8000 -e MOKA_API_KEY=... moka serve runs/quickstart --host 0.0.0.0
FROM python:3.12-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /src
COPY pyproject.toml setup.py MANIFEST.in README.md LICENSE constraints.txt ./
COPY configs configs
COPY moka moka
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" "torch==$(sed -n 's/^torch==\([^ ;]*\).*/\1/p' constraints.txt)" \
 && pip install --no-cache-dir -c constraints.txt ".[demo,serve,llama2,quant]"
RUN useradd --create-home moka
USER moka
WORKDIR /work
ENTRYPOINT ["moka"]
