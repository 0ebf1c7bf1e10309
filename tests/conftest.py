from __future__ import annotations

from hypothesis import settings

# No deadline: a busy machine is not a failure. No database: a run leaves nothing behind in the checkout.
settings.register_profile("tpt_megatron", deadline=None, database=None)
settings.load_profile("tpt_megatron")
