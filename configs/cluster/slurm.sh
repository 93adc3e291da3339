#!/usr/bin/env bash
# sbatch configs/cluster/slurm.sh CONFIG [KEY=VALUE]...   from a folder that all nodes share, with mmtrain on the path
#SBATCH --job-name=mmtrain
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1     # one launcher a node: it starts a process for each GPU
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300       # five minutes before the end: finish the step, save, exit 138
#SBATCH --requeue
#SBATCH --open-mode=append      # one log over all requeues
set -uo pipefail
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 40000))
srun --kill-on-bad-exit=0 bash -c \
    'exec mmtrain train "${@:2}" --nodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" --rendezvous "$1"' \
    mmtrain "$first:$port" "$@"
code=$?
# 138 and 143: stopped by a signal, with everything saved; the same job resumes from there
if [ "$code" -eq 138 ] || [ "$code" -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
