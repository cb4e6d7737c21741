#!/usr/bin/env bash
# torchrun on two machines of 8 GPUs: the same line on each, with its own NODE. Not run by us on GPUs.
#
#   HEAD=10.0.0.1 NODE=0 bash configs/launch/torchrun_two_nodes.sh CONFIG.yaml     # the first machine, whose address it is
#   HEAD=10.0.0.1 NODE=1 bash configs/launch/torchrun_two_nodes.sh CONFIG.yaml     # the second
#
# Plain torchrun means DDP. For DeepSpeed, put its settings after CONFIG.yaml, for each stage that is trained:
#   training.deepspeed=configs/deepspeed/zero3.json alignment.deepspeed=configs/deepspeed/zero3.json
# GPUS=4 for machines of 4. All need the same code and paths, and a shared output.dir.
set -eu
exec torchrun --nnodes "${NODES:-2}" --node-rank "$NODE" --nproc-per-node "${GPUS:-8}" \
    --master-addr "$HEAD" --master-port "${PORT:-29500}" -m moka train "$@"
