"""An aligned model as others load it: an adapter, a merged model, a GGUF file, with its model card, checked."""
