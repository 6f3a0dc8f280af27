"""Arguments that every operator checks alike."""

from __future__ import annotations

import pytest
import torch

import dimo_ext as dx
from tests.conftest import assert_rejected


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=str)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_sparse_logits_are_refused(device, layout):
    dense = torch.eye(3, device=device)
    sparse = dense.to_sparse(layout=layout)
    targets = torch.arange(3, device=device)
    expected, given = "a dense tensor", f"layout {layout}"
    assert_rejected(lambda: dx.sample_categorical(sparse), "logits", expected, given)
    assert_rejected(lambda: dx.masked_cross_entropy(sparse, targets), "logits", expected, given)
    assert_rejected(lambda: dx.token_divergence(dense, sparse, "forward_kl"), "auxiliary_logits", expected, given)
    assert_rejected(lambda: dx.perturb_embeddings(sparse, 0.5), "embeddings", expected, given)
