"""Experts that no worker has memory for, served in slices by real workers."""

from __future__ import annotations

from pathlib import Path

from expert_mesh import Client
from mesh.model_config import ModelConfig
from tests.families import PLAIN, make_checkpoint
from tests.integration.test_families import make_prompts, plain_oracle
from tests.running import running_mesh

NUM_NEW = 12


def test_experts_too_large_for_any_worker_answer_as_whole_ones(tmp_path: Path) -> None:
    directory = make_checkpoint(PLAIN, tmp_path, num_local_experts=4, num_hidden_layers=2)
    memory_bytes = ModelConfig.from_hf(directory).expert_bytes("float32") * 6 // 10
    flags = ("--workers", "8", "--memory-bytes", str(memory_bytes))
    with running_mesh("--model", directory, *flags) as mesh:
        plan = mesh.expert_mesh("plan", "--target", mesh.placement)
        # Four experts in two slices each, each on a worker of its own.
        assert sorted((e["layer"], e["index"]) for e in plan["experts"]) == [
            (1, index) for index in range(8)
        ]
        assert len({worker for e in plan["experts"] for worker in e["workers"]}) == 8
        with Client(mesh.gateway) as client:
            for prompt in make_prompts((5, 12, 1)):
                completion = client.complete(
                    prompt, max_tokens=NUM_NEW, temperature=0.0, ignore_eos=True
                )
                _, expected = plain_oracle(directory, prompt, NUM_NEW)
                assert list(completion.choices[0].token_ids) == expected
