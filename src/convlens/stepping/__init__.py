"""What `engine.step` needs around it: losses that fail, memory that runs out, fp16, CUDA graphs."""
