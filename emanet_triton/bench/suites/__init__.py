"""The suites by name. A new suite is a module with a value ``SUITE``, and a place in this table."""

from emanet_triton.bench.suite import Suite
from emanet_triton.bench.suites import conv, em, model, post, train_mem

SUITES: dict[str, Suite] = {
    suite.name: suite for suite in (em.SUITE, model.SUITE, post.SUITE, train_mem.SUITE, conv.SUITE)
}
