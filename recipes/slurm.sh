#!/bin/bash
# A run on several machines under Slurm:
#
#   sbatch --nodes=8 recipes/slurm.sh recipes/llama-3-70b.yaml [KEY=VALUE]...
#
# from a shell in which `srppo` is on the path, in a directory that all machines share. Five minutes
# before the time limit (--signal) the run ends the step it is in, keeps it, and is queued again; so
# it is after preemption, for as long as the cluster's GraceTime. The job then goes on where it was.
# checkpoint.grace is how long a step may take to end: less than those five minutes by the time that
# saving takes. Hardware: any. Not run on a cluster yet; tests/test_slurm.py runs it without one.

#SBATCH --job-name=srppo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append

set -euo pipefail

read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
port=$((20000 + SLURM_JOB_ID % 10000))

# One launcher on each machine; they meet on the first. When one fails the others end within
# seconds, with the message of the one that failed: --wait is for those that cannot.
srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --wait=60 \
  srppo run "$@" checkpoint.grace=240 \
  --nproc "${SLURM_GPUS_ON_NODE:-1}" --nodes "$SLURM_JOB_NUM_NODES" --rendezvous "$first:$port" &
step=$!

again='' came=''
trap 'came=yes again=yes; kill -TERM "$step"' USR1 # the time is nearly up
trap 'came=yes; kill -TERM "$step"' TERM

while true; do
  came=''
  wait "$step" && status=0 || status=$?
  [[ $came && $status -gt 128 ]] || break # a signal had ended `wait`, not the step
done

if [[ $again && $status -eq 143 ]]; then # kept, and not done
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
