"""Reference log-probs that are computed once and kept on disk.

The cache holds one number per response token. The key of a pair is the digest of its token ids. The folder's name is a
digest of everything else that the log-probs depend on: base weights, quantization, the adapter that training starts
from, and the type of the matrix products. It also covers what changes the rounding: layout, compilation, torch's
version and the processor. (In bfloat16, rounding changes the log-prob of a whole answer by about a nat.) It does not
cover the objective, learning rate, epochs, filters or output folder. Nor does it cover source, tokenizer, chat template
and truncation, because the token ids already depend on them.
"""

import hashlib
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor
from tqdm.auto import tqdm

from lit_dpo.data.batch import PairBatch
from lit_dpo.data.tokenization import TokenizedPair
from lit_dpo.files.atomic import atomic_write
from lit_dpo.files.cache import cache_dir
from lit_dpo.objectives import PairLogps
from lit_dpo.reference.base import Reference
from lit_dpo.reference.initial import InitialPolicy

KEY = np.dtype("S16")  # type of TokenizedPair.key
BATCH_TOKENS = 8192  # maximum number of tokens in a batch of the reference pass
SHARD_SECONDS, SHARD_PAIRS = 30.0, 4096  # a shard is written at least this often; an interruption loses no more


class Pairs(Protocol):
    """Tokenized pairs by index. Keys and sizes can be read without reading the tokens."""

    def pair(self, index: int) -> TokenizedPair:
        """One pair."""

    def keys(self, indices: Sequence[int]) -> list[bytes]:
        """``TokenizedPair.key`` of each pair."""

    def num_tokens(self, indices: Sequence[int]) -> list[int]:
        """Number of tokens of each pair."""


class CachedReference(Reference):
    """A frozen policy's log-probs on disk. Log-probs of missing pairs are computed and added.

    Each shard is a file with the keys and token log-probs of some pairs. It is written atomically, and its name is the
    digest of its content. A damaged shard is therefore noticed, removed and computed again.

    Args:
        initial: Policy that computes missing log-probs.
        folder: Folder of this reference's shards.
    """

    def __init__(self, initial: InitialPolicy, folder: Path) -> None:
        self.initial, self.folder = initial, folder
        self._names: set[str] = set()  # names of the shards that were read
        self._shards: list[Any] = []  # open shards
        self._keys = np.empty(0, KEY)  # sorted
        self._places = np.empty((0, 3), np.int64)  # for each key: index of its shard, start and end offset in it
        self._new: dict[bytes, np.ndarray] = {}  # not on disk yet; NumPy, as autograd rejects inference tensors
        self._saved = time.monotonic()
        self._read()

    @classmethod
    def in_cache(cls, initial: InitialPolicy, dtype: torch.dtype) -> "CachedReference":
        """Opens the cache folder that belongs to ``initial`` with matrix products in ``dtype``."""
        return cls(initial, cache_dir() / "reference" / initial.identity(dtype))

    def __len__(self) -> int:
        """Number of pairs whose log-probs are known."""
        return len(self._keys) + len(self._new)

    def logps(self, batch: PairBatch) -> PairLogps:
        """Log-probs of P pairs, without gradients."""
        found = [self._find(key) for key in batch.keys]
        known = [logps for logps in found if logps is not None]
        if len(known) < len(found):
            if self.initial.policy.sharded:
                raise ValueError(
                    "trainer.strategy=sharded needs the cached log-probs of all pairs before they are used, but these "
                    "come from a stream or from data of your own. Set model.reference=live."
                )
            return batch.sum_responses(self._compute(batch))
        return batch.sum_responses(torch.cat(known).to(batch.input_ids.device, non_blocking=True))

    def missing(self, keys: Sequence[bytes]) -> list[int]:
        """Positions in ``keys`` of the pairs whose log-probs are not known."""
        wanted = np.array(keys, KEY)
        place = np.searchsorted(self._keys, wanted).clip(max=max(len(self._keys) - 1, 0))
        known = self._keys[place] == wanted if len(self._keys) else np.zeros(len(wanted), bool)
        return [index for index in np.flatnonzero(~known).tolist() if keys[index] not in self._new]

    def fill(
        self,
        pairs: Pairs,
        indices: Sequence[int],
        *,
        shares: Sequence[tuple[int, int]] = ((0, 1),),
        barrier: Callable[[], Any] = lambda: None,
        title: str = "Reference log-probs",
        progress_bar: bool = True,
    ) -> int:
        """Computes the missing pairs, in batches of similar length, with a progress bar.

        Args:
            pairs: The pairs.
            indices: Indices of the pairs to fill; the same on all ranks.
            shares: This rank's share of the work in each pass, as (index, number of shares). The first pass divides the
                work among all ranks. A second pass divides it among the ranks of one node. It computes what a node
                still misses if the nodes have no common disk.
            barrier: Function that waits for the other ranks.
            title: Title of the progress bar.
            progress_bar: Whether to show a progress bar.

        Returns:
            Number of pairs that this rank computed.
        """
        computed = 0
        keys = pairs.keys(indices)
        for number, parts in shares:
            barrier()
            self._read()  # reads shards of other ranks, so that all ranks miss the same pairs
            barrier()
            missing = [indices[position] for position in self.missing(keys)]
            work: list[list[int]] = []
            if missing:
                # The padded layout computes the model's own logits, which take far more memory.
                limit = BATCH_TOKENS if self.initial.policy.flat else BATCH_TOKENS // 8
                work = list(_by_length(missing, pairs.num_tokens(missing), limit))
            batches = work[number::parts]
            total = sum(map(len, batches))
            try:
                with tqdm(
                    total=total, desc=title, unit="pair", disable=number > 0 or not total or not progress_bar
                ) as bar:
                    for batch in batches:
                        self._compute(PairBatch.from_pairs([pairs.pair(index) for index in batch]).to(self._device))
                        bar.update(len(batch))
                if behind := math.ceil(len(work) / parts) - len(batches):
                    self.initial.keep_in_step(behind)
            finally:
                self.save()
            computed += total
            barrier()
            self._read()
        return computed

    def save(self) -> None:
        """Writes the log-probs that are not on disk yet to a new shard."""
        self._saved = time.monotonic()
        if not self._new:
            return
        content = save(
            {
                "keys": np.frombuffer(b"".join(self._new), np.uint8).reshape(-1, KEY.itemsize),
                "lengths": np.array([len(logps) for logps in self._new.values()]),
                "logps": np.concatenate(list(self._new.values())),
            }
        )
        try:
            self._write(content)
        except OSError as error:
            raise OSError(
                f"The reference cache {self.folder} cannot be written: {error}. Set LIT_DPO_CACHE to a folder with "
                "enough space, or set model.reference=live."
            ) from error
        self._new = {}
        self._read()

    def _write(self, content: bytes) -> None:
        """Writes a shard."""
        with atomic_write(self.folder / f"{_digest(content)}.safetensors") as path:
            path.write_bytes(content)

    @property
    def _device(self) -> torch.device:
        return next(self.initial.policy.parameters()).device

    def _compute(self, batch: PairBatch) -> Tensor:
        """Computes the log-probs of the batch's response tokens, (R,), and keeps them for each pair."""
        logps = self.initial.token_logps(batch)
        lengths = [sum(segment.trained) for segment in batch.segments]
        self._new |= zip(batch.keys, np.split(logps.cpu().numpy().copy(), np.cumsum(lengths)[:-1]), strict=True)
        if len(self._new) >= SHARD_PAIRS or time.monotonic() - self._saved > SHARD_SECONDS:
            self.save()
        return logps

    def _find(self, key: bytes) -> Tensor | None:
        if key in self._new:
            return torch.from_numpy(self._new[key])
        wanted = np.array(key, KEY)
        index = int(np.searchsorted(self._keys, wanted))
        if index == len(self._keys) or self._keys[index] != wanted:
            return None
        file, start, end = self._places[index].tolist()
        logps: Tensor = self._shards[file].get_slice("logps")[start:end]
        return logps

    def _read(self) -> None:
        """Opens the shards in the folder that are not open yet."""
        keys, places = [self._keys], [self._places]
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name in self._names:
                continue
            try:
                if _digest(path.read_bytes()) != path.stem:
                    raise ValueError("its content does not match its name")
                shard = safe_open(path, "pt")
                ends = shard.get_tensor("lengths").cumsum(0).numpy()
                found = shard.get_tensor("keys").numpy().copy().view(KEY)[:, 0]
            except OSError as error:
                warnings.warn(f"{path} cannot be read ({error}); its pairs will be computed again.", stacklevel=2)
                self._names.add(path.name)
                continue
            except (ValueError, SafetensorError) as error:
                warnings.warn(f"{path} is damaged ({error}); its pairs will be computed again.", stacklevel=2)
                path.unlink(missing_ok=True)
                continue
            places.append(np.stack([np.full_like(ends, len(self._shards)), np.r_[0, ends[:-1]], ends], 1))
            keys.append(found)
            self._names.add(path.name)
            self._shards.append(shard)
        if len(keys) > 1:
            self._keys, first = np.unique(np.concatenate(keys), return_index=True)
            self._places = np.concatenate(places)[first]


def _by_length(indices: Sequence[int], num_tokens: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Batches of at most ``limit`` tokens, longest pairs first. A pair longer than the limit is a batch of its own."""
    batch: list[int] = []
    tokens = 0
    for length, index in sorted(zip(num_tokens, indices, strict=True), reverse=True):
        if batch and tokens + length > limit:
            yield batch
            batch, tokens = [], 0
        batch.append(index)
        tokens += length
    if batch:
        yield batch


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
