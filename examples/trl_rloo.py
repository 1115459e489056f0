"""TRL's RLOOTrainer with the coherent reward, on the miniature's prompts.

    python examples/trl_rloo.py BASE SFT OUT      srppo:miniature runs/miniature-seed0/sft runs/trl

SFT is a whole model: the policy starts from it, and the KL penalty refers to it. Without one,
`srppo sft recipes/miniature.yaml` makes it.
"""

import sys
from pathlib import Path

from datasets import Dataset
from trl import RLOOConfig, RLOOTrainer

from srppo.miniature import world
from srppo.models.load import load_tokenizer
from srppo.plugins.trl import CoherentReward


def main(base: str, sft: str, out: str, **settings: object) -> Path:
    reward = CoherentReward.load(base, sft, device="cpu")
    ours = {
        "output_dir": out,
        "beta": 0.2,  # the KL coefficient; TRL's own 0.05 asks for pi_sft (pi_sft/pi_base)^20
        "num_generations": 4,
        "per_device_train_batch_size": 128,
        "steps_per_generation": 2,
        "max_completion_length": 16,
        "max_steps": 60,
        "learning_rate": 3e-4,
        "normalize_advantages": True,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 10,
    }
    turns = [[{"role": "user", "content": row["prompt"]}] for row in world.prompts(seed=0)]
    trainer = RLOOTrainer(
        model=sft,
        reward_funcs=reward,
        callbacks=[reward],  # so that it sees the settings above, before anything is trained
        args=RLOOConfig(**ours | settings),
        train_dataset=Dataset.from_dict({"prompt": turns}),
        processing_class=load_tokenizer(sft),
    )
    trainer.train()
    policy = Path(out) / "policy"
    trainer.save_model(str(policy))
    print(f"aligned model  {policy}")
    return policy


if __name__ == "__main__":
    main(*sys.argv[1:])
