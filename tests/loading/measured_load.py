"""Run by test_loading_memory.py: `python measured_load.py DIR DTYPE ...` saves a model of about 200 MB and loads it in
each dtype.

Prints as JSON, in bytes: the weights of each dtype, the largest tensor of the files, and the peak of anonymous memory
(RssAnon, what only this process holds; mapped file pages do not count) above the start while loading, and while saving.
"""

import gc
import json
import sys
import threading
from pathlib import Path

import torch

from nemotron_h import NemotronHConfig, NemotronHForCausalLM
from nemotron_h.checkpoint.directory import open_directory

torch.set_num_threads(1)


def anonymous() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("no RssAnon in /proc/self/status")


class Peak:
    """Highest anonymous memory inside the block, above that at its start, looked at every millisecond."""

    def __enter__(self) -> "Peak":
        gc.collect()
        self.start = self.peak = anonymous()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.done.wait(0.001):
            self.peak = max(self.peak, anonymous())

    def __exit__(self, *_: object) -> None:
        self.peak = max(self.peak, anonymous())
        self.done.set()
        self.thread.join()

    @property
    def rise(self) -> int:
        return self.peak - self.start


directory, dtypes = Path(sys.argv[1]), sys.argv[2:]
config = NemotronHConfig(
    vocab_size=8192, hidden_size=1024, hybrid_override_pattern="EM*E", num_attention_heads=8, num_key_value_heads=2,
    mamba_num_heads=16, mamba_n_groups=2, n_routed_experts=32, moe_intermediate_size=512,
    moe_shared_expert_intermediate_size=512, intermediate_size=512,
)  # fmt: skip
NemotronHForCausalLM(NemotronHConfig(hidden_size=8, vocab_size=8, hybrid_override_pattern="-")).save_pretrained(
    directory
)
NemotronHForCausalLM.from_pretrained(directory)  # what is imported late, is now

with torch.device("meta"):
    model = NemotronHForCausalLM(config).bfloat16()
model.to_empty(device="cpu")
for tensor in model.state_dict().values():
    tensor.fill_(0.5)  # so that its pages are there
with Peak() as saving:
    model.save_pretrained(directory, max_shard_size="60MB")
del model
loaded = {}
for dtype in dtypes:
    with Peak() as loading:
        model = NemotronHForCausalLM.from_pretrained(directory, dtype=dtype)
    loaded[dtype] = {"weights": sum(t.nbytes for t in model.state_dict().values()), "rise": loading.rise}
    del model
files = open_directory(directory)
print(
    json.dumps(
        {
            "largest": max(info.nbytes for info in files.tensors.values()),
            "files": len(files.files),
            "loaded": loaded,
            "saving": saving.rise,
        }
    )
)
