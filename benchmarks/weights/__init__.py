"""What quantized weights cost a model: as we compute with them, and as transformers does with the dequantized ones."""
