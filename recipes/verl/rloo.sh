#!/usr/bin/env bash
# SRPPO with RLOO inside verl 0.9.1: vLLM samples, FSDP trains, srppo scores.
# Hardware: 8 GPUs of 80 GB, and one more (or another machine) for the scoring server.
# Not run: no such machine was at hand. The settings are checked by the plugin, which is tested
# against verl's own code on a CPU (tests/plugins/test_verl.py).
#
# On the scoring machine:
#   pip install '.[serve]'           # in a checkout of srppo
#   export SRPPO_REWARD_TOKEN=...      # openssl rand -hex 32
#   srppo serve-reward --base $BASE --sft $SFT --dtype bfloat16 \
#     --host 0.0.0.0 --token-env SRPPO_REWARD_TOKEN
# Here, in verl's environment, whose transformers is older than srppo's:
#   pip install --no-deps PATH       # of a checkout of srppo
#
# The KL penalty must be switched on: verl has none by default, and 0.001 where it has one.
set -euo pipefail
: "${SFT:?the SFT model}" "${TRAIN:?prompts as verl's parquet}" "${VAL:?likewise, held out}"
: "${SRPPO_REWARD_URL:?http://HOST:8000 of the scoring server}" "${SRPPO_REWARD_TOKEN:?its token}"

# Ray's workers inherit the two variables where the cluster was started with them; else put them into
# the runtime environment of `ray job submit`. Not on the command line, where everyone can read them.
python -m verl.trainer.main_ppo \
  data.train_files="$TRAIN" \
  data.val_files="$VAL" \
  data.train_batch_size=256 \
  data.max_prompt_length=1024 \
  data.max_response_length=1024 \
  actor_rollout_ref.model.path="$SFT" \
  actor_rollout_ref.actor.optim.lr=1e-6 \
  actor_rollout_ref.actor.ppo_mini_batch_size=64 \
  actor_rollout_ref.rollout.name=vllm \
  actor_rollout_ref.rollout.n=4 \
  actor_rollout_ref.rollout.temperature=1.0 \
  algorithm.adv_estimator=rloo \
  algorithm.use_kl_in_reward=True \
  algorithm.kl_ctrl.kl_coef=0.5 \
  reward.reward_manager.source=importlib \
  reward.reward_manager.name=CoherentRewardManager \
  reward.reward_manager.module.path=pkg://srppo.plugins.verl \
  trainer.n_gpus_per_node=8
