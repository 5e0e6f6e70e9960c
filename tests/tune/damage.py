"""What broken kernels make of right results: damages by name, each of one stage's results in place.

A damage gets the results (name: tensor) and the Call that they belong to. MEMORY holds those of memory that is not the
kernel's own, TOLERATED those that verification lets through, because rounding could do as much.
"""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import torch

from sparsek_tune import reference
from sparsek_tune.reference import Selection

WRONG, MEMORY, TOLERATED = {}, {}, {}  # name: (template, damage)


def _in(table, template):
    def add(function):
        table[function.__name__.replace("_", " ")] = template, function
        return function

    return add


class Call(SimpleNamespace):
    """One call of the operator: dout, query, key, value, scores, k, window, scale, gate."""

    def but(self, **changes):
        return Call(**{**vars(self), **changes})

    def forward(self):
        """out, lse and the selection, in float64."""
        tensors = (t.double() for t in (self.query, self.key, self.value, self.scores))
        return reference.attention_forward(*tensors, self.k, self.window, self.scale, self.gate)

    def backward(self, **changes):
        """dq, dk, dv, du in float64; changes: of "out" and the fields of the selection."""
        out, lse, *found = self.forward()
        out, found = changes.pop("out", out), Selection(*found)._replace(**changes)
        tensors = (t.double() for t in (self.dout, self.query, self.key, self.value, self.scores))
        options = self.k, self.window, self.scale, self.gate
        grads = reference.attention_backward(*tensors, out, lse, found, *options)
        return dict(zip(("dq", "dk", "dv", "du"), grads, strict=True))


def _set(r, **values):
    for name, value in values.items():
        if name in r:
            r[name].copy_(value)


# --- out, lse


@_in(WRONG, "forward")
def one_entry_of_out_is_nan(r, c):
    r["out"][0, 1, 77, 3] = float("nan")


@_in(WRONG, "forward")
def the_last_tile_of_out_is_not_written(r, c):
    r["out"][:, :, (r["out"].shape[2] - 1) // 64 * 64 :] = 0


@_in(WRONG, "forward")
def two_heads_are_swapped(r, c):
    r["out"].copy_(r["out"].flip(1))


@_in(WRONG, "forward")
def the_window_is_one_longer(r, c):
    out, lse, *_ = c.but(window=c.window + 1).forward()
    _set(r, out=out, lse=lse)


@_in(WRONG, "forward")
def one_key_fewer_is_selected(r, c):
    out, lse, *_ = c.but(k=c.k - 1).forward()
    _set(r, out=out, lse=lse)


@_in(WRONG, "forward")
def the_gate_is_left_out_of_the_logits(r, c):
    out, lse, *_ = c.but(gate="v").forward()
    _set(r, out=out, lse=lse)


@_in(WRONG, "forward")
def one_tile_is_a_tenth_too_large(r, c):
    r["out"][:, :1, 64:80] *= 1.1


@_in(WRONG, "forward")
def lse_is_to_base_2(r, c):
    r["lse"] /= torch.tensor(2.0).log()


@_in(WRONG, "forward")
def lse_is_off_by_a_hundredth(r, c):
    r["lse"] += 0.01


# --- dq


@_in(WRONG, "dq")
def one_head_of_dq_is_not_scaled(r, c):
    r["dq"][:, 1] /= c.scale


@_in(WRONG, "dq")
def delta_is_left_out(r, c):
    _set(r, dq=c.backward(out=torch.zeros_like(c.query).double())["dq"])


@_in(WRONG, "dq")
def the_last_row_of_dq_is_not_written(r, c):
    r["dq"][:, :, -1] = 0


# --- dk, dv, du


@_in(WRONG, "dkv")
def one_row_of_dk_is_zero(r, c):
    r["dk"][0, 0, 100] = 0


@_in(WRONG, "dkv")
def one_segment_is_left_out(r, c):
    dout = c.dout.clone()
    dout[:, :, 256:512] = 0
    _set(r, **c.but(dout=dout).backward())


@_in(WRONG, "dkv")
def one_head_of_the_group_is_left_out(r, c):
    dout = c.dout.clone()
    dout[:, 1] = 0
    _set(r, **c.but(dout=dout).backward())


@_in(WRONG, "dkv")
def dv_lacks_the_window(r, c):
    i, group = torch.arange(c.query.shape[2]), c.query.shape[1] // c.key.shape[1]
    local = (i <= i[:, None]) & (i > i[:, None] - c.window)
    key = c.key.double().repeat_interleave(group, 1)
    logits = c.scale * c.query.double() @ key.mT - c.forward()[1][..., None]
    share = (logits.masked_fill(~local, -torch.inf).exp().mT @ c.dout.double()).unflatten(1, (-1, group)).sum(2)
    _set(r, dv=c.backward()["dv"] - share)


@_in(WRONG, "dkv")
def one_entry_of_dv_is_infinite(r, c):
    r["dv"][0, 1, 5, 0] = torch.inf


@_in(WRONG, "dkv")
def du_is_off_by_a_hundredth(r, c):
    r["du"] *= 1.01


@_in(WRONG, "dkv")
def du_lacks_the_share_of_tau(r, c):
    def without(g, selected, s, start, stop):
        i = torch.arange(start, stop)[:, None]
        inside = (s.sat_end[:, None, :stop] <= i) & (i < s.sup_end[:, None, :stop])
        return g.masked_fill(~(inside & selected), 0).sum(1)

    with mock.patch.object(reference, "_score_grad", without):
        _set(r, du=c.backward()["du"])


@_in(WRONG, "dkv")
def the_interval_of_du_is_one_short(r, c):
    found = Selection(*c.forward()[2:])
    _set(r, du=c.backward(sup_end=found.sup_end - 1)["du"])


@_in(WRONG, "dkv")
def one_entry_of_du_is_zero(r, c):
    size = r["du"].abs()
    r["du"].view(-1)[int((size - size.square().mean().sqrt()).abs().argmin())] = 0


# --- the selection


def _middle(t, n):
    """The index of an entry that is neither at the start nor at the end."""
    return int(((t[0, 0] > n // 4) & (t[0, 0] < n // 2)).nonzero()[0])


@_in(WRONG, "threshold")
def one_tau_is_that_of_the_query_before(r, c):
    n = r["tau"].shape[-1]
    at = n // 2 + int(r["tau"][0, 0].diff()[n // 2 :].argmax()) + 1
    r["tau"][0, 0, at] = r["tau"][0, 0, at - 1]


@_in(WRONG, "threshold")
def tau_is_finite_where_all_are_selected(r, c):
    r["tau"][r["tau"].isinf()] = -1e30


@_in(WRONG, "threshold")
def one_key_expires_a_query_late(r, c):
    r["expiry"][0, 0, _middle(r["expiry"], r["tau"].shape[-1])] += 1


@_in(WRONG, "threshold")
def one_key_is_saturated_too_long(r, c):
    at = _middle(r["sat_end"], r["tau"].shape[-1])
    r["sat_end"][0, 0, at] = r["tau"].shape[-1]


@_in(WRONG, "threshold")
def one_key_is_never_cut(r, c):
    at = _middle(r["sup_end"], r["tau"].shape[-1])
    r["sup_end"][0, 0, at] = r["tau"].shape[-1]


@_in(WRONG, "threshold")
def one_count_is_off(r, c):
    r["interior"][0, 1, -1] += 1


# --- memory. The results are tensors of their own; ``as_strided`` reaches what lies beside them


def _beside(t, offset, count=1):
    return t.as_strided((count,), (1,), t.storage_offset() + offset)


@_in(MEMORY, "forward")
def writes_after_the_end(r, c):
    _beside(r["out"], r["out"].numel())[0] = 1


@_in(MEMORY, "forward")
def writes_before_the_start(r, c):
    _beside(r["lse"], -1)[0] = 1


@_in(MEMORY, "forward")
def writes_one_row_too_many_in_every_head(r, c):
    out = r["out"]
    _beside(out, out.numel(), out.shape[-1]).copy_(out[0, 0, -1])


@_in(MEMORY, "schedule")
def writes_into_the_next_carved_buffer(r, c):
    _beside(r["first"], r["first"].numel())[0] = 1


@_in(MEMORY, "dkv")
def writes_one_bit_far_away(r, c):
    _beside(r["du"], r["du"].numel() + 200_000).view(torch.int32)[0] ^= 1


@_in(MEMORY, "forward")
def changes_an_input(r, c):
    c.key[0, 0, 5, 3] += 1


@_in(MEMORY, "forward")
def writes_beside_an_input(r, c):
    _beside(c.value, -7)[0] = 0


@_in(MEMORY, "dkv")
def changes_the_selection(r, c):
    c.selection.expiry[0, 0, 3] -= 1


# --- what goes through


@_in(TOLERATED, "forward")
def one_tile_is_a_hundredth_too_large(r, c):
    r["out"][:, :1, 64:80] *= 1.01


@_in(TOLERATED, "forward")
def lse_is_off_by_a_thousandth(r, c):
    r["lse"] += 0.001


@_in(TOLERATED, "dkv")
def dk_is_off_by_three_thousandths(r, c):
    r["dk"] *= 1.003


@_in(TOLERATED, "dkv")
def one_row_of_dk_is_off_by_three_hundredths(r, c):
    r["dk"][0, 0, 100] *= 1.03
