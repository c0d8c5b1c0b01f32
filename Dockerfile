# fastpref on PyTorch's CUDA image. The kernels are compiled where nvcc is; what runs them needs no compiler.
#
#   docker build -t fastpref .
#   docker run --rm --gpus all -v "$PWD:/work" fastpref train examples/quickstart.yaml
#
# The torch of the image is the one that constraints.txt pins; another one: --build-arg TORCH=2.12.0-cuda13.0-cudnn9
ARG TORCH=2.13.0-cuda13.0-cudnn9

# The Python of newer images is Ubuntu's: without headers, and closed to pip (PEP 668), which here nobody else uses.
FROM pytorch/pytorch:${TORCH}-devel AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ python3-dev && rm -rf /var/lib/apt/lists/*
COPY . /src
RUN FASTPREF_CUDA=ON python3 -m pip wheel --no-deps --wheel-dir /wheels /src

FROM pytorch/pytorch:${TORCH}-runtime
ENV PIP_BREAK_SYSTEM_PACKAGES=1
# Triton compiles the launchers of its kernels.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev python3-dev && \
    rm -rf /var/lib/apt/lists/*
# TRL, PEFT and 8-bit AdamW beside it. torch is the image's: nothing here may replace it.
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    python3 -c "import torch; print('torch==' + torch.__version__)" > /tmp/torch.txt && \
    python3 -m pip install --no-cache-dir --constraint /tmp/torch.txt \
    "$(ls /wheels/fastpref-*.whl)[triton,train,peft,optim,trl,liger]"
WORKDIR /work
ENTRYPOINT ["fastpref"]
CMD ["info"]
