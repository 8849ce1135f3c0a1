"""Images, texts, and what is known of them; embeddings."""
