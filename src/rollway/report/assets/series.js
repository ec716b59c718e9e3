// Curves as arrays: seeds averaged, intervals, smoothing, one axis of rounds for all lines of a chart.

const T_975 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.16, 2.145, 2.131];

/** 97.5 % quantile of Student's t. */
export function quantileOfT(degrees) {
  if (degrees <= T_975.length) return T_975[degrees - 1];
  return 1.96 + 2.4 / degrees + 3.2 / degrees ** 2;
}

/**
 * Lines of one figure. series: run -> [rounds, values, lows?, highs?]. One line per name: the mean over its seeds in
 * rounds that all have reached, with a band (`t`: 95 % interval of that mean; `range`: lowest and highest seed; a single
 * seed keeps the figure's own interval). With `seeds` each seed is a thin line too.
 */
export function linesOf(series, runs, { hidden = new Set(), band = "t", seeds = false, smooth = 0 } = {}) {
  const names = new Map();
  for (const run of runs) {
    if (series[run.run] && !hidden.has(run.name)) names.set(run.name, [...(names.get(run.name) || []), run.run]);
  }
  const lines = [];
  for (const [name, members] of names) {
    const mean = members.length === 1 ? single(series[members[0]]) : averaged(members.map((run) => series[run]), band);
    if (band === "none") mean.low = mean.high = null;
    if (seeds && members.length > 1) {
      for (const run of members) {
        lines.push({ label: run, name, thin: true, ...smoothed(single(series[run]), smooth, true) });
      }
    }
    lines.push({ label: name, name, thin: false, ...smoothed(mean, smooth, false) });
  }
  return lines;
}

function single([x, y, low = null, high = null]) {
  return { x, y, low, high };
}

function averaged(members, band) {
  const maps = members.map(([rounds, values]) => new Map(rounds.map((round, i) => [round, values[i]])));
  const x = [...maps[0].keys()].filter((round) => maps.every((map) => map.has(round) && map.get(round) !== null));
  const y = [];
  const low = [];
  const high = [];
  for (const round of x) {
    const values = maps.map((map) => map.get(round));
    const mean = values.reduce((a, b) => a + b, 0) / values.length;
    const variance = values.reduce((a, b) => a + (b - mean) ** 2, 0) / (values.length - 1);
    const half = quantileOfT(values.length - 1) * Math.sqrt(variance / values.length);
    y.push(mean);
    low.push(band === "t" ? mean - half : Math.min(...values));
    high.push(band === "t" ? mean + half : Math.max(...values));
  }
  return { x, y, low, high };
}

/** An exponential mean over rounds, its weights corrected at the start; bands are smoothed like their line. */
function smoothed(line, weight, thin) {
  const run = (values) => {
    if (!values || weight === 0) return values;
    let total = 0;
    let mass = 0;
    return values.map((value) => {
      if (value === null) return null;
      total = weight * total + value;
      mass = weight * mass + 1;
      return total / mass;
    });
  };
  return { x: line.x, y: run(line.y), low: thin ? null : run(line.low), high: thin ? null : run(line.high) };
}

/** [rounds, column, column, ...] with null where a line has no point; a band is two more columns of its line. */
export function columnsOf(lines) {
  const x = [...new Set(lines.flatMap((line) => line.x))].sort((a, b) => a - b);
  const place = new Map(x.map((round, i) => [round, i]));
  const column = (line, values) => {
    const found = new Array(x.length).fill(null);
    line.x.forEach((round, i) => {
      found[place.get(round)] = values[i];
    });
    return found;
  };
  const columns = [x];
  for (const line of lines) {
    columns.push(column(line, line.y));
    if (line.low) columns.push(column(line, line.low), column(line, line.high));
  }
  return columns;
}

/** The value of a line at a round, or the last one before it; null where it starts later. */
export function valueAt(line, round) {
  let found = null;
  line.x.forEach((x, i) => {
    if (x <= round && line.y[i] !== null) found = line.y[i];
  });
  return found;
}
