"""FedMF with P-LoRA or P-RQ in PyTorch alone, written by hand for speed: the strongest competitor that we
could write without a kernel of our own.

All clients of a round train at once, ragged rather than padded: positions lie one behind the other, `owner`
says whose each is. Gradients are written out, and since a score is linear in every table, an item's gradient
is a scalar (the sum of the loss's derivatives at its positions) times a vector that all items of the client
share; so only scalars are scattered. Where all pairs of client and item fit (`dense_cells`), the frozen part
is one matrix product for the scores and one for the gradient, and the scalars live in [C, I]; elsewhere in
the distinct (client, item) pairs met, found by sorting. LoRA's rows exist for those a client touches only.
Adam is torch's own fused kernel (what torch.optim.Adam(fused=True) calls), one call an epoch for all
parameters.

Tried and slower on ML-100K (94 clients a round, one thread): torch.unique for LoRA's rows where cells fit
(1.7 ms against 0.5); `index_add_` for sums over a client's rows (0.4 ms against 0.04 by embedding_bag with
weights); segment_reduce (0.12); bmm of [K, D] by [D, 1] (1.2 ms against 0.2 transposed); fresh memory
instead of kept buffers (310 us a fill against 80); chunks that fit the second-level cache (calls cost more
than misses save); torch.compile of gradient, L2 and Adam in one kernel (1.2 to 1.3 ms a step against 1.0 for
the three calls).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.baselines.negatives import Negatives, UniformNegatives
from benchmarks.baselines.problem import ADAM, Problem, item_vectors


class Ragged(NamedTuple):
    """Positions of a chunk of clients.

    Attributes:
        clients: int64 [C], user ids. sizes: int64 [C].
        owner: int64 [N], 0 ... C - 1.
        positives: int64 [N], items. negatives: int64 [E, N].
        scale: [N], 1 / n of the owner.
        cells: how (client, item) pairs are numbered.
        positive_cells: int64 [N]. negative_cells: int64 [E, N].
    """

    clients: Tensor
    sizes: Tensor
    owner: Tensor
    positives: Tensor
    negatives: Tensor
    scale: Tensor
    cells: Cells
    positive_cells: Tensor
    negative_cells: Tensor


class Cells(NamedTuple):
    """Numbers of (client, item) pairs: all C x I of them, or the `count` distinct ones that are met.

    Attributes:
        dense: which of the two.
        count: of cells.
        rows: int64 [R], cells that are met, ascending; None where nobody needs them.
        owner, items: int64 [R], client and item of each of `rows`.
        offsets: int64 [C], where each client's rows begin.
    """

    dense: bool
    count: int
    rows: Tensor | None
    owner: Tensor | None
    items: Tensor | None
    offsets: Tensor | None


class HandWritten:
    """Trains a `Problem`; see the module.

    Args:
        problem: what to train.
        negatives: how negatives are drawn; None draws them by `UniformNegatives`.
        dense_cells: most (client, item) pairs of a chunk that are kept as a matrix, if they are also at most
            `dense_factor` times its positions.
        chunk_floats: elements of the largest tensor of a chunk, which should stay in cache.
    """

    def __init__(
        self,
        problem: Problem,
        negatives: Negatives | None = None,
        *,
        dense_cells: int = 4_000_000,
        dense_factor: int = 40,
        chunk_floats: int = 1_500_000,
    ) -> None:
        self.problem = problem
        dataset, training = problem.dataset, problem.config.training
        self._epochs, self._l2, self._lr = training.local_epochs, training.l2, problem.lr
        self._draw = negatives or UniformNegatives(dataset, training.local_epochs)
        self._dense_cells, self._dense_factor = dense_cells, dense_factor
        self._num_items = dataset.num_items
        self._indptr = torch.from_numpy(dataset.indptr)
        self._items = torch.from_numpy(dataset.indices)
        self._sizes = self._indptr.diff()
        self._users, self._base = problem.users.clone(), problem.base
        self._A = None if problem.A is None else problem.A.clone()
        self._B = None if problem.B is None else problem.B.clone()
        self._codebooks = self._code_rows = None
        if problem.codes is not None and problem.codebooks is not None:
            self._codebooks = problem.codebooks.clone()
            levels, size, _ = problem.codebooks.shape
            self._code_rows = problem.codes + torch.arange(levels) * size
        self._chunk_floats = chunk_floats
        self._buffers: dict[str, Tensor] = {}
        self._round = 0

    def result(self) -> tuple[Tensor, Tensor]:
        """See `Contender`."""
        parts = (self._A, self._B, self.problem.codes, self._codebooks)
        return self._users, item_vectors(self._base, *parts)

    @torch.no_grad()
    def round(self) -> None:
        """See `Contender`."""
        self._round += 1
        clients = torch.from_numpy(self.problem.clients(self._round))
        sizes = self._sizes[clients]
        width = self._base.shape[1]
        if self._codebooks is not None:
            elements = torch.full_like(sizes, self._codebooks.numel())
        else:
            elements = sizes * ((1 + self._epochs) * self._B.shape[1])  # type: ignore[union-attr]
        chunk = (elements.cumsum(0) - elements) // max(self._chunk_floats, width)
        totals: list[Tensor] = []
        for number in range(int(chunk[-1]) + 1):
            part = clients[chunk == number] if int(chunk[-1]) else clients
            sums = self._lora(part) if self._codebooks is None else self._rq(part)
            totals = [a + b for a, b in zip(totals, sums, strict=True)] if totals else sums
        share = self.problem.server_lr / float(sizes.sum())
        averaged = (self._A, self._B) if self._codebooks is None else (self._codebooks,)
        for parameter, total in zip(averaged, totals, strict=True):
            assert parameter is not None
            parameter.add_(total, alpha=share)

    # ---- positions

    def _ragged(self, clients: Tensor, rows: bool) -> Ragged:
        """Positions of `clients`; `rows` asks for the cells that are met."""
        sizes = self._sizes[clients]
        owner = torch.repeat_interleave(torch.arange(len(clients)), sizes)
        start = self._indptr[clients] - (sizes.cumsum(0) - sizes)
        source = torch.arange(len(owner)).add_(start[owner])
        positives = self._items[source]
        negatives = self._draw(clients, self._round)
        first = owner * self._num_items
        positive_cells, negative_cells = first + positives, first + negatives
        count = len(clients) * self._num_items
        if count <= min(self._dense_cells, self._dense_factor * len(owner)):
            met = None
            if rows:
                flags = torch.zeros(count, dtype=torch.bool)
                flags.index_fill_(0, positive_cells, True).index_fill_(0, negative_cells.flatten(), True)
                met = flags.nonzero().squeeze(1)
            cells = self._cells(True, count, met, met, len(clients))
        else:
            both = torch.cat([positive_cells[None], negative_cells])
            met, numbers = torch.unique(both, return_inverse=True)
            positive_cells, negative_cells = numbers[0], numbers[1:]
            cells = self._cells(False, len(met), torch.arange(len(met)), met, len(clients))
        scale = sizes.to(self._base.dtype).reciprocal_()[owner]
        return Ragged(
            clients, sizes, owner, positives, negatives, scale, cells, positive_cells, negative_cells
        )

    def _cells(self, dense: bool, count: int, rows: Tensor | None, keys: Tensor | None, C: int) -> Cells:
        if keys is None:
            return Cells(dense, count, None, None, None, None)
        owner = torch.div(keys, self._num_items, rounding_mode="floor")
        offsets = torch.searchsorted(owner, torch.arange(C))
        return Cells(dense, count, rows, owner, keys - owner * self._num_items, offsets)

    # ---- what both embeddings share

    def _base_scores(self, at: Ragged, user: Tensor) -> Tensor:
        """user . base of all cells."""
        cells = at.cells
        if cells.dense:
            return (user @ self._base.T).flatten()
        assert cells.items is not None
        assert cells.owner is not None
        return torch.linalg.vecdot(self._base[cells.items], user[cells.owner])

    def _base_gradient(self, at: Ragged, slopes: Tensor) -> Tensor:
        """d user of the frozen part [C, D], from the slope at each cell."""
        cells = at.cells
        if cells.dense:
            return slopes.view(len(at.clients), -1) @ self._base
        assert cells.items is not None
        return F.embedding_bag(cells.items, self._base, cells.offsets, mode="sum", per_sample_weights=slopes)

    @staticmethod
    def _slope(positive: Tensor, negative: Tensor, scale: Tensor) -> Tensor:
        """d loss / d positive score of each pair."""
        return torch.sigmoid(negative - positive).mul_(scale).neg_()

    def _slopes(self, at: Ragged, epoch: int, slope: Tensor) -> Tensor:
        """Sum of slopes at each cell. A client's positives and negatives share no item."""
        sums = slope.new_zeros(at.cells.count)
        sums.index_add_(0, at.positive_cells, slope)
        return sums.index_add_(0, at.negative_cells[epoch], slope, alpha=-1)

    def _adam(
        self, parameters: list[Tensor], gradients: list[Tensor], moments: list[Tensor], epoch: int
    ) -> None:
        count = len(parameters)
        torch._fused_adam_(
            parameters,
            gradients,
            moments[:count],
            moments[count:],
            [],
            [torch.tensor(epoch + 1.0)] * count,
            lr=self._lr,
            weight_decay=0.0,
            amsgrad=False,
            maximize=False,
            **ADAM,
        )

    def _buffer(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Memory kept from chunk to chunk: fresh pages would cost more than what is written to them."""
        size = math.prod(shape)
        kept = self._buffers.get(name)
        if kept is None or len(kept) < size:
            kept = self._buffers[name] = self._base.new_empty(size)
        return kept[:size].view(shape)

    # ---- P-LoRA

    def _lora(self, clients: Tensor) -> list[Tensor]:
        """Train `clients`; the weighted sums of their changes to A and B."""
        assert self._A is not None
        assert self._B is not None
        at = self._ragged(clients, rows=True)
        cells = at.cells
        rows, items, offsets = cells.rows, cells.items, cells.offsets
        assert rows is not None
        assert items is not None
        assert offsets is not None
        counts = torch.diff(offsets, append=offsets.new_tensor([len(rows)]))
        every = torch.arange(len(rows))
        user = self._users[clients]
        start = self._A[items]
        A, B = start.clone(), self._B.expand(len(clients), -1, -1).clone()
        moments = [torch.zeros_like(p) for p in (A, B, user) * 2]
        for epoch in range(self._epochs):
            shared = torch.bmm(user.unsqueeze(1), B).squeeze(1)  # d score / d a row of A [C, r]
            shared_rows = torch.repeat_interleave(shared, counts, 0)
            scores = self._base_scores(at, user).index_add_(0, rows, torch.linalg.vecdot(A, shared_rows))
            slope = self._slope(scores[at.positive_cells], scores[at.negative_cells[epoch]], at.scale)
            slopes = self._slopes(at, epoch, slope)
            slopes_rows = slopes[rows] if cells.dense else slopes
            pooled = F.embedding_bag(every, A, offsets, mode="sum", per_sample_weights=slopes_rows)
            d_user = self._base_gradient(at, slopes).add_(torch.bmm(B, pooled.unsqueeze(2)).squeeze(2))
            d_B = user.unsqueeze(2) * pooled.unsqueeze(1)
            d_A = shared_rows.mul_(slopes_rows.unsqueeze(1))
            if self._l2 > 0.0:
                d_A.addcmul_(A, (d_A != 0).any(1, keepdim=True).to(A.dtype), value=self._l2)
                d_B.addcmul_(B, (d_B != 0).any(2, keepdim=True).to(B.dtype), value=self._l2)
                d_user.add_(user, alpha=self._l2)
            self._adam([A, B, user], [d_A, d_B, d_user], moments, epoch)
        self._users[clients] = user
        weights = at.sizes.to(A.dtype)
        change = A.sub_(start).mul_(torch.repeat_interleave(weights, counts).unsqueeze(1))
        d_B = torch.mv(B.sub_(self._B).flatten(1).T, weights).view_as(self._B)
        return [torch.zeros_like(self._A).index_add_(0, items, change), d_B]

    # ---- P-RQ

    def _rq(self, clients: Tensor) -> list[Tensor]:
        """Train `clients`; the weighted sum of their changes to the codebooks."""
        assert self._codebooks is not None
        assert self._code_rows is not None
        at = self._ragged(clients, rows=False)
        C, height, width = len(clients), self._codebooks[..., 0].numel(), self._codebooks.shape[2]
        first = (at.owner * height).unsqueeze(1)
        positive_codes = first + self._code_rows[at.positives]
        user = self._users[clients]
        start = self._codebooks.view(1, height, width)
        shape = (C, height, width)
        books = self._buffer("books", shape).copy_(start.expand(shape))
        gradient = self._buffer("gradient", shape)
        moments = [
            self._buffer("first", shape).zero_(),
            torch.zeros_like(user),
            self._buffer("second", shape).zero_(),
            torch.zeros_like(user),
        ]
        for epoch in range(self._epochs):
            negative_codes = first + self._code_rows[at.negatives[epoch]]
            code_scores = torch.bmm(user.unsqueeze(1), books.transpose(1, 2)).flatten()
            scores = self._base_scores(at, user)
            slope = self._slope(
                scores[at.positive_cells] + code_scores[positive_codes].sum(1),
                scores[at.negative_cells[epoch]] + code_scores[negative_codes].sum(1),
                at.scale,
            )
            # A row that both items of a pair read has no gradient from it, exactly; a rest of rounding would
            # be scaled up to a full step by Adam.
            apart = slope.unsqueeze(1) * (positive_codes != negative_codes)
            slopes = slope.new_zeros(C * height)
            slopes.index_add_(0, positive_codes.flatten(), apart.flatten())
            slopes.index_add_(0, negative_codes.flatten(), apart.flatten(), alpha=-1)
            slopes = slopes.view(C, height, 1)
            d_user = self._base_gradient(at, self._slopes(at, epoch, slope))
            d_user.add_(torch.bmm(slopes.transpose(1, 2), books).squeeze(1))
            d_books = torch.mul(slopes, user.unsqueeze(1), out=gradient)
            if self._l2 > 0.0:
                d_books.addcmul_(books, (slopes != 0).to(books.dtype), value=self._l2)
                d_user.add_(user, alpha=self._l2)
            self._adam([books, user], [d_books, d_user], moments, epoch)
        self._users[clients] = user
        weights = at.sizes.to(books.dtype)
        # sum_c w_c (books_c - start), in one pass.
        total = torch.mv(books.view(C, -1).T, weights).view_as(self._codebooks)
        return [total.sub_(self._codebooks, alpha=float(weights.sum()))]
