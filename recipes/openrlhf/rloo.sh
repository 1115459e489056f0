#!/usr/bin/env bash
# SRPPO with RLOO inside OpenRLHF 0.11.2: vLLM samples, DeepSpeed trains, srppo scores.
# Hardware: 8 GPUs of 80 GB, and one more (or another machine) for the scoring server.
# Not run: no such machine was at hand. The arguments are checked by the plugin, whose agent is
# tested against OpenRLHF's own code on a CPU (tests/plugins/test_openrlhf.py).
#
# On the scoring machine:
#   pip install '.[serve]'           # in a checkout of srppo
#   export SRPPO_REWARD_TOKEN=...      # openssl rand -hex 32
#   srppo serve-reward --base $BASE --sft $SFT --dtype bfloat16 \
#     --host 0.0.0.0 --token-env SRPPO_REWARD_TOKEN
# Here, in OpenRLHF's environment, whose transformers is older than srppo's:
#   pip install --no-deps PATH       # of a checkout of srppo
#
# The clip must be given: OpenRLHF holds rewards in [-10, 10], a sum of log-ratios is soon beyond.
# The KL coefficient must be given: 0.01, its default, asks for pi_sft (pi_sft/pi_base)^100.
set -euo pipefail
: "${SFT:?the SFT model}" "${PROMPTS:?a JSONL file with prompts}" "${OUT:?where to save}"
: "${SRPPO_REWARD_URL:?http://HOST:8000 of the scoring server}" "${SRPPO_REWARD_TOKEN:?its token}"

# Ray's workers inherit the two variables where the cluster was started with them; else put them into
# the runtime environment of `ray job submit`. Not on the command line, where everyone can read them.
python -m srppo.plugins.openrlhf \
  --actor.model_name_or_path "$SFT" \
  --data.prompt_dataset "$PROMPTS" \
  --data.apply_chat_template \
  --data.max_len 2048 \
  --rollout.max_new_tokens 1024 \
  --rollout.batch_size 256 \
  --rollout.n_samples_per_prompt 4 \
  --train.batch_size 128 \
  --actor.adam.lr 1e-6 \
  --algo.advantage.estimator rloo \
  --algo.kl.init_coef 0.5 \
  --reward.clip_range -1000000 1000000 \
  --ckpt.output_dir "$OUT"
