-- Demonstrations of one kind of digit string: what the policy learns. The other kinds are held out to see what it forgets.
SELECT rollout_id
FROM scored
WHERE source <> 'policy' AND json_extract_string(meta, '$.domain') = 'reverse'
