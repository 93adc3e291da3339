"""The contrastive objective: embeddings of queries and documents, where each query is closest to its own."""
