-- Forgets the scheduled destructions. The keys stay as they are.
DROP TABLE key_destructions;
