-- Rows routed by domain, as FiberPO's four-level form needs it (arXiv 2603.08239): a key of the prompt's meta.
-- param key: string=domain, the key
SELECT rollout_id,
       coalesce(json_extract_string(meta, '$.' || $key), error('a prompt has no meta key ' || $key)) AS route
FROM scored
