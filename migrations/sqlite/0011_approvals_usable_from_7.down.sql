-- Forgets the requests for approval. Nothing that was approved and done is undone.
DROP TABLE approvals;
