"""What a 4-bit cache costs a model: teacher-forced evaluation, the paper's baselines, and planted outliers."""
