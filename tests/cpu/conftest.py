"""Settings of all tests on the CPU, beside those of tests/conftest."""

from hypothesis import HealthCheck, settings

# An example of a few milliseconds takes a quarter of a second where other programs have the cores.
settings.register_profile("busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy machine")
