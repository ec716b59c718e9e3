-- normalised(answer): an answer as votes are counted, as the metric maj@k does it: white space collapsed, case folded (so
-- that a sharp s and SS are the same), a closing full stop dropped. Letters of Cherokee come out small where Unicode folds to large.
-- example: SELECT DISTINCT normalised(answer) AS answer FROM evals WHERE round = 0 ORDER BY answer LIMIT 3
-- after: case_folded
CREATE MACRO normalised(answer) AS
    -- Unicode's white space, as Python's str.split has it.
    rtrim(regexp_replace(case_folded(trim(regexp_replace(answer, '[\t-\r\x1c-\x20\x85\p{Z}]+', ' ', 'g'))), '\.$', ''));
