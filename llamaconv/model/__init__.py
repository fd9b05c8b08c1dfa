"""What a Llama is: names, shapes, parameters, published sizes, RoPE layouts, a reference forward pass."""
