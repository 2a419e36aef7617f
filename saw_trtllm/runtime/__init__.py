"""The runtime: requests in, tokens out. Nothing here but the executors knows a tensor library or a GPU."""
