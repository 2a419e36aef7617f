from hypothesis import HealthCheck, settings

# The same examples in every run, however long they take: one that nobody has met yet is looked for, and not met by
# chance in a change of something else. A file with ``--hypothesis-profile=default`` draws others.
NO_TIMES = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("fixed", derandomize=True, database=None, **NO_TIMES)
settings.load_profile("fixed")
