"""How tests draw arbitrary reports: few, the same each time."""

from hypothesis import HealthCheck, Phase, settings

ANY_REPORT = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # shrinking whole reports takes minutes
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
