-- SDPO alone (arXiv 2601.20802): rollouts of which the teacher of curate.teacher has something to say; right ones with
-- a right sibling are among them, the only right one of a group is not.
SELECT rollout_id
FROM scored
WHERE has_teacher
