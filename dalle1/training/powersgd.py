"""PowerSGD: gradients averaged over replicas, each matrix as a product of two thin ones.

Section 2.5 and appendix E, on Vogels et al. (2019), "PowerSGD: Practical Low-Rank Gradient
Compression". A replica is whatever holds one copy of the weights: a rank, or a machine whose ranks
hold its shards. Only torch is used. Gradients, buffers and messages are float32 (ours).

Dims: m the shorter side of a matrix, n the longer one, r the rank, R the number of replicas.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

JITTER = 1e-6  # times I, added to P (appendix E)
BUCKET = 2**26  # elements of a message, unless a single tensor has more
BLOCK = re.compile(r"(^|\.)((layers|resblocks)\.\d+|block_\d+)\.")


def compressible(name: str, shape: Sequence[int]) -> bool:
    """Whether a parameter is a matrix or a kernel inside of a residual block (appendix E).

    By its name: `layers.3.` in the transformer, `resblocks.3.` in CLIP, `block_1.` in the dVAE.
    Embeddings, unembeddings, CLIP's projections and the dVAE's input and output convolutions
    are outside of the blocks; gains and biases have one dimension.
    """
    return len(shape) > 1 and BLOCK.search(name) is not None


def matrices(shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """The shapes that `PowerSGD` takes, of parameters' shapes: a matrix, or (elements,) of others.

    A kernel [out, in, k, k] is a matrix [out, in k k]. The transformer's qkv [3w, w] is one matrix,
    which sends 4wr elements where the paper's three send 6wr (see `saving`).
    """
    return {
        name: (shape[0], math.prod(shape[1:])) if compressible(name, shape) else (math.prod(shape),)
        for name, shape in shapes.items()
    }


def worth_compressing(shape: Sequence[int], rank: int) -> bool:
    """Whether the two factors of a matrix are smaller than it; never so for rank >= m."""
    return len(shape) == 2 and sum(shape) * rank < math.prod(shape)


def saving(width: int, rank: int, gpus: int = 8) -> float:
    """Share of a block's gradient that need not be sent: 1 - 5r/(8d) for 8 GPUs (appendix E).

    A matrix is sharded over a machine's g GPUs along its output, the second one of the MLP along
    its input, and r counts the ranks of all g shards: each shard is compressed to rank r/g. (The
    table's r = 896 exceeds the 496 columns of a shard at d = 3968, so it cannot be one shard's.)

        of a GPU                 elements      P          Q
        q, k, v, attention.out   4 d·d/g       4 d·r/g    4 d/g·r/g
        mlp.up                   d·4d/g        d·r/g      4d/g·r/g
        mlp.down                 4d/g·d        4d/g·r/g   d·r/g
        sum                      12 d²/g       (6d + 12d/g)·r/g

    So (g + 2)r/(2gd) is sent. Embeddings, unembeddings, gains and biases are not counted.
    """
    return 1 - (gpus + 2) * rank / (2 * gpus * width)


class PowerSGD:
    """Averages gradients over the replicas of a process group.

    With M = gradient + error buffer, transposed where that makes m <= n, one round is

        P = mean(M Q) + 1e-6 I        [m, r], Q [n, r] a fixed Gaussian
        O = orthonormal basis of P    [m, r], Householder
        S = mean(Mᵀ O)                [n, r]
        gradient <- O Sᵀ = O Oᵀ mean(M), error buffer <- M - O Sᵀ

    Each replica has its own M, and all have the same O Sᵀ. A buffer keeps what its replica wanted
    to add and what the common gradient lacks, as in Vogels et al. Gradients thus depend on the mean
    of the buffers alone, which becomes (I - O Oᵀ) mean(M). A checkpoint needs nothing else (see
    `state`). All replicas compute O from the same P, with equal bits on equal machines.

    A fixed Q has a price. O spans mean(M) Q, so the mean of the buffers times Q is 0, and the next
    P depends on the new gradients alone. The buffers are worked off in the directions of these, at
    a rate of about r/m a step under the noise of batches, and not at all if the gradient never
    changes.

    Args:
        shapes: of the gradients by name, in the same order on all replicas, see `matrices`. A pair
            (rows, columns) is compressed where it is `worth_compressing`, all else is sent
            uncompressed. The gradient may have another shape, of which this is a view: the rows of
            a flat shard, for example.
        rank: r of each matrix; where matrices are sharded the paper's r is that of all shards.
        seed: of the Qs, together with the name; the same on all replicas and after a restart.
        group: the replicas; None: the default group, or one replica without torch.distributed.
    """

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        rank: int,
        seed: int,
        group: dist.ProcessGroup | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if rank < 1:
            raise ValueError(f"rank {rank}: expected at least 1")
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.rank, self.group = rank, group
        self.replicas = dist.get_world_size(group) if dist.is_initialized() else 1
        self.compressed = [
            name for name, shape in self.shapes.items() if worth_compressing(shape, rank)
        ]
        self.q = {
            name: _gaussian(seed, name, max(self.shapes[name]), rank).to(device)
            for name in self.compressed
        }
        self._errors = {
            name: torch.zeros(self.shapes[name], device=device) for name in self.compressed
        }

    @torch.no_grad()
    def average(self, gradients: Mapping[str, Tensor], compress: bool = True) -> bool:
        """Replaces the gradients by their mean over the replicas; all must call it together.

        Args:
            gradients: float32, of all names in `shapes`. They must not be multiplied by a loss
                scale: the buffers outlive a scale, and the jitter is absolute. A replica with a
                reason to skip the update may put a NaN into one of them.
            compress: if False, all is sent uncompressed and the buffers do not change.

        Returns:
            Whether all numbers of all replicas are finite. If not, the error buffers are as before,
            the compressed gradients are NaN, and the update must be skipped.
        """
        self._check(gradients)
        if not compress:
            return mean_over([gradients[name] for name in self.shapes], self.group)
        uncompressed = [gradients[name] for name in self.shapes if name not in self.q]
        sums = []  # M, in the memory of the gradient where its strides allow: [m, n]
        for name in self.compressed:
            matrix = gradients[name].reshape(self.shapes[name])
            sums.append(_wide(matrix.add_(self._errors[name])))
        p = [m @ q for m, q in zip(sums, self.q.values(), strict=True)]
        # A mean with an infinity or NaN of any replica is not finite, so that all decide alike.
        finite = mean_over(uncompressed + p, self.group)
        if finite:
            bases = [_basis(x) for x in p]
            s = [m.mT @ basis for m, basis in zip(sums, bases, strict=True)]
            finite = mean_over(s, self.group)
        if not finite:
            for name in self.compressed:
                gradients[name].fill_(math.nan)
            return False
        for i, name in enumerate(self.compressed):
            common = bases[i] @ s[i].mT  # [m, n]
            _wide(self._errors[name]).copy_(sums[i]).sub_(common)
            if self.shapes[name][0] > self.shapes[name][1]:
                common = common.mT
            gradients[name].copy_(common.reshape(gradients[name].shape))
        return True

    def state(self) -> dict[str, Tensor]:
        """The mean of the replicas' error buffers, on the CPU; all must call it together.

        It is the sum of appendix E in our units: the paper's replicas add up gradients of a loss
        that is divided by the global batch, ours average gradients of their own share. This mean
        and all gradients returned so far add up to all gradients taken in.

        Each replica continues with the mean, as if it had loaded the state. Later gradients are the
        same but for rounding, and a resumed run is equal to the bit. The buffers' random walk about
        their mean, which only costs precision, restarts.
        """
        mean_over(list(self._errors.values()), self.group)
        return {name: error.to("cpu", copy=True) for name, error in self._errors.items()}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores what `state` returned, under any number of replicas.

        Raises:
            ValueError: the state is of other matrices, as after a change of the rank.
        """
        if set(tensors) != set(self.compressed):
            names = sorted(set(tensors) ^ set(self.compressed))
            raise ValueError(f"error buffers of other matrices than those compressed: {names}")
        for name, error in self._errors.items():
            if tensors[name].shape != error.shape:
                raise ValueError(
                    f"error buffer {name}: expected {list(error.shape)}, "
                    f"got {list(tensors[name].shape)}"
                )
        for name, error in self._errors.items():
            error.copy_(tensors[name])

    @property
    def bytes_uncompressed(self) -> int:
        """Bytes that a replica gives to one average without compression."""
        return 4 * sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def bytes_sent(self) -> int:
        """Bytes that a replica gives to one average; (m + n) r numbers for a compressed matrix."""
        spared = sum(
            math.prod(self.shapes[name]) - sum(self.shapes[name]) * self.rank
            for name in self.compressed
        )
        return self.bytes_uncompressed - 4 * spared

    def _check(self, gradients: Mapping[str, Tensor]) -> None:
        if set(gradients) != set(self.shapes):
            names = sorted(set(gradients) ^ set(self.shapes))
            raise ValueError(f"gradients of other parameters than those declared: {names}")
        for name, shape in self.shapes.items():
            gradient = gradients[name]
            if gradient.dtype != torch.float32 or gradient.numel() != math.prod(shape):
                raise ValueError(
                    f"gradient {name}: expected float32 of {math.prod(shape)} elements, "
                    f"got {gradient.dtype} {list(gradient.shape)}"
                )


def mean_over(tensors: Sequence[Tensor], group: dist.ProcessGroup | None) -> bool:
    """Mean over the ranks of a group, in place, in few messages; whether all of it is finite."""
    world_size = dist.get_world_size(group) if dist.is_initialized() else 1
    finite = []
    for bucket in buckets(tensors, BUCKET):
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        if world_size > 1:
            dist.all_reduce(flat, group=group)
            flat.div_(world_size)
            means = flat.split([tensor.numel() for tensor in bucket])
            for tensor, mean in zip(bucket, means, strict=True):
                tensor.copy_(mean.view(tensor.shape))
        finite.append(flat.isfinite().all())
    return not finite or bool(torch.stack(finite).all())


def _gaussian(seed: int, name: str, rows: int, columns: int) -> Tensor:
    # Drawn on the CPU, whose generator gives the same numbers wherever the training runs.
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
    return torch.randn(rows, columns, generator=generator)


def _wide(matrix: Tensor) -> Tensor:
    """The matrix or its transpose, a view with rows <= columns (appendix E)."""
    return matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix


def _basis(p: Tensor) -> Tensor:
    """Orthonormal columns that span P's, even where P has less than full rank."""
    identity = torch.eye(*p.shape, dtype=p.dtype, device=p.device)
    basis: Tensor = torch.linalg.qr(p + JITTER * identity).Q  # by Householder, on GPUs too
    return basis


def buckets(tensors: Sequence[Tensor], max_elements: int) -> Iterator[list[Tensor]]:
    """The tensors in order, in groups of at most `max_elements` or of a single tensor."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and size + tensor.numel() > max_elements:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket
