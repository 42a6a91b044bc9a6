#!/bin/bash
# Training on several nodes without a scheduler: run this on every node, with the same HEAD (a node that all others
# reach) and JOB (any word). A node that is lost is waited for; then all ranks go on from the latest state.
#
#   HEAD=node1 JOB=wan NODES=2 examples/train_nodes.sh examples/wan14b_tmd_n4h5_stage1.yaml [--set name=value ...]
set -euo pipefail
: "${HEAD:?name the node that all others reach}" "${JOB:?any word, the same on every node}" "${NODES:=1}" "${GPUS:=8}"
# a store of its own for every attempt: otherwise restarted ranks may find addresses of dead ones (torch 2.14)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun --nnodes "$NODES" --nproc-per-node "$GPUS" --max-restarts 3 \
  --rdzv-backend c10d --rdzv-endpoint "$HEAD:29500" --rdzv-id "$JOB" \
  -m students.train "$@" --resume
