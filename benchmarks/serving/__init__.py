"""tritonserver: under load, and started and ended again and again."""
