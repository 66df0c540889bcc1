"""How far the logits of pruned candidates are from the dense ones: many candidates in one stream of the blocks.

A candidate is a state: one level of a supernet for every site. Candidates that agree up to some block share the forward
pass up to there. The dense model's last hidden states are stored once, in 16 bits, so the divergence is exact over the
whole vocabulary without storing logits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from budwood.checkpoints.reader import Shards
from budwood.checkpoints.work import Work
from budwood.models.block_calls import record_calls
from budwood.sparsity.level_search import State
from budwood.supernet.supernet import DENSE, Supernet

if TYPE_CHECKING:
    from budwood.stream.model import Model

CHUNK = 256  # tokens whose logits are computed at a time


@dataclass
class Path:
    """Candidates that were equal so far, and their batches of hidden states, [batch, tokens, hidden] each."""

    members: list[int]
    hidden: list[Tensor]


class Divergence:
    """The fitness of states: the KL divergence of the dense distribution to the candidate's, mean over tokens.

    windows: the pool that samples are drawn from, token ids [windows, tokens]. tokens: of each stage. The last position
    of every window is left out.
    """

    def __init__(self, model: "Model", windows: Tensor, tokens: Sequence[int], work: Work, supernet: Supernet):
        self.model, self.windows, self.tokens, self.supernet = model, windows, tokens, supernet
        self.dense = dense_states(model, windows, work)
        self.block_tokens = 0  # tokens times blocks that candidates went through

    @property
    def passes(self) -> float:
        """The work so far in forward passes of the model over all windows of the pool."""
        return self.block_tokens / (len(self.model) * self.windows.numel())

    def samples(self, stage: int) -> int:
        """Windows that a stage uses."""
        return samples_for(self.tokens[stage], self.windows.shape[1])

    def __call__(self, states: Sequence[State], stage: int, samples: Sequence[int]) -> list[float]:
        length = max(2, min(self.tokens[stage], self.windows.shape[1]))
        room = self.model.activation_limit // (len(states) * length * self._token_bytes())
        size = max(1, min(len(samples), room))
        total = torch.zeros(len(states), dtype=torch.float64)
        for start in range(0, len(samples), size):
            total += self._sums(states, samples[start : start + size], length)
        return (total / (len(samples) * (length - 1))).tolist()

    def _token_bytes(self) -> int:
        return int(self.dense.shape("0")[-1]) * self.model.compute.itemsize

    def _sums(self, states: Sequence[State], samples: Sequence[int], length: int) -> Tensor:
        """Divergences summed over tokens, float64 [states]."""
        model = self.model
        ids = self.windows[list(samples), :length]
        embedded = model.embed(ids)
        paths = [Path([*range(len(states))], [embedded.read(i, torch.device("cpu")) for i in embedded.indices()])]
        with torch.no_grad():
            for block in model.blocks():
                places = [place for place, _ in self.supernet.at(block.index)]
                new = []
                for path in paths:
                    branches: dict[tuple[int, ...], list[int]] = {}
                    for member in path.members:
                        branches.setdefault(tuple(states[member][place] for place in places), []).append(member)
                    for members in branches.values():
                        weights = self.supernet.weights(block, states[members[0]])
                        outputs = [block.forward(hidden, weights).cpu() for hidden in path.hidden]
                        new.append(Path(members, outputs))
                        self.block_tokens += ids.numel()
                paths = new
            return self._compare(paths, len(states), samples, length)

    def _compare(self, paths: Sequence[Path], count: int, samples: Sequence[int], length: int) -> Tensor:
        model, total = self.model, torch.zeros(count, dtype=torch.float64)
        chunk = min(CHUNK, length)
        right = flat([self.dense.read(str(sample))[None, :length] for sample in samples])
        found = [flat(path.hidden) for path in paths]
        with model.outside():
            head = record_calls(model.module, model.modules, self.windows[:1, :chunk].to(model.device))

            def log_probabilities(hidden: Tensor) -> Tensor:
                """[tokens, hidden] -> [tokens, vocabulary]; the head is always called for `chunk` tokens."""
                padded = hidden.new_zeros(chunk, hidden.shape[1])
                padded[: len(hidden)] = hidden
                logits = head.logits(padded[None].to(model.device, model.compute))[0, : len(hidden)]
                return log_softmax(logits.float(), dim=-1)

            for start in range(0, len(right), chunk):
                dense = log_probabilities(right[start : start + chunk])
                shares = dense.exp()
                for path, hidden in zip(paths, found, strict=True):
                    other = log_probabilities(hidden[start : start + chunk])
                    lost = torch.linalg.vecdot(shares, other.neg_().add_(dense))  # [tokens]
                    total[path.members] += max(0.0, float(lost.double().sum()))
        return total


def flat(batches: Sequence[Tensor]) -> Tensor:
    """All positions but the last of every window: [batch, tokens, hidden] each -> [positions, hidden]."""
    return torch.cat([batch[:, :-1].flatten(0, 1) for batch in batches])


def samples_for(tokens: int, length: int) -> int:
    """Windows of a length that hold a number of tokens; a single one is cut."""
    return max(1, tokens // length)


def dense_states(model: "Model", windows: Tensor, work: Work) -> Shards:
    """The dense model's hidden states after the last block, [tokens, hidden] for each window by its number, 16 bits."""

    def make() -> Mapping[str, Tensor]:
        for _ in model.survey(windows, "outputs of the dense model"):
            pass
        assert model.activations is not None
        hidden = model.activations.hidden
        large = max(abs(float(edge)) for edge in hidden.aminmax()) > torch.finfo(torch.float16).max
        stored = torch.bfloat16 if large or hidden.dtype == torch.bfloat16 else torch.float16
        return {str(index): window.to(stored) for index, window in enumerate(hidden)}

    if not work.file(f"{DENSE}.safetensors").is_file():
        work.save(DENSE, make())
    return work.shards(DENSE)
