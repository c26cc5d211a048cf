#!/bin/bash
# A run shared by the tasks of a SLURM array: each makes its share of the maps in one folder on a shared disk. The task
# that finds every map makes the scores, tables and report. After a failure submit it again: only missing work is done.
#
#   sbatch --array=0-15 examples/slurm.sh faces.toml runs/faces 16
#   sbatch --array=3,7  examples/slurm.sh faces.toml runs/faces 16     # two of them again
#
#SBATCH --job-name=explain2me
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --output=%x-%A-%a.log
set -euo pipefail
# activate your environment here, unless the submitting shell did: source /path/to/.venv/bin/activate

usage="usage: sbatch --array=0-15 slurm.sh CONFIG RUN 16"
config=${1:?$usage}
run=${2:?$usage}
shares=${3:?$usage}

# 3 (more images are quarantined than allowed) is no failure of the machine
code=0
srun explain2me run "$config" --out "$run" --shard "$SLURM_ARRAY_TASK_ID/$shares" || code=$?
((code == 3)) && exit 0
exit "$code"
