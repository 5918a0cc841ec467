"""From an adapter to a merged model and GGUF files."""
