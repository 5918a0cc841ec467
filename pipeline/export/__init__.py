"""Makes a merged model and GGUF files of an adapter."""
