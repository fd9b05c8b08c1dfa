// The cockpit of the lesson: one small head, its rows in two orders, its rotation in two forms.
// Needs no kernel, no network and no library; the picture that it replaces stays without scripts.
((host, head) => {
  if (!host || host.shadowRoot) return;
  const HALF = head.speeds.length, LAYOUTS = ["half_split", "interleaved"];
  const every = [...Array(HALF).keys()];
  const low = (i) => "₀₁₂₃₄₅₆₇"[i];
  const name = (row) => "ab"[Math.floor(row / HALF)] + low(row % HALF);

  // Which row is at each place, and which two places the rotation joins.
  const rowAt = {
    half_split: [...every, ...every.map((i) => i + HALF)],
    interleaved: every.flatMap((i) => [i, i + HALF]),
  };
  const placesOf = {
    half_split: every.map((i) => [i, i + HALF]),
    interleaved: every.map((i) => [2 * i, 2 * i + 1]),
  };

  const rotated = ([x, y], angle) => {
    const [c, s] = [Math.cos(angle), Math.sin(angle)];
    return [x * c - y * s, x * s + y * c];
  };

  // What the program computes: k at `position`, q `distance` further on.
  const run = (rows, rotation, position, distance) => {
    const pairs = placesOf[rotation].map((places, i) => {
      const joined = places.map((place) => rowAt[rows][place]);
      const q = rotated(joined.map((row) => head.q[row]), (position + distance) * head.speeds[i]);
      const k = rotated(joined.map((row) => head.k[row]), position * head.speeds[i]);
      return { places, joined, q, k, product: q[0] * k[0] + q[1] * k[1] };
    });
    return { rows, rotation, pairs, right: rows === rotation,
      score: pairs.reduce((sum, pair) => sum + pair.product, 0) };
  };

  const number = (x) => x.toFixed(head.digits).replace(/^-(?=[0.]*$)/, "").replace("-", "−");
  const CELL = 52, LEFT = 8, TOP = 92, WIDTH = 2 * LEFT + 2 * HALF * CELL, SLOT = WIDTH / HALF;
  const middle = (place) => LEFT + (place + 0.5) * CELL;

  const arc = ({ places: [first, second] }, i) => {
    const [from, to] = [middle(first), middle(second)];
    const wide = second > first + 1, tall = wide ? 46 + 10 * i : 34;
    return `<path class="arc" d="M${from} ${TOP}A${(to - from) / 2} ${tall} 0 0 1 ${to} ${TOP}"/>` +
      `<text class="small" x="${wide ? from - 14 : (from + to) / 2}" y="${TOP - 8}">θ${low(i)}</text>`;
  };

  const cell = (row, place) => {
    const colour = head.colours[row % HALF], hollow = row >= HALF;
    return `<rect x="${LEFT + place * CELL + 3}" y="${TOP + 2}" width="${CELL - 6}" height="34" rx="4"` +
      ` fill="${hollow ? "none" : colour}" stroke="${colour}" stroke-width="3"/>` +
      `<text class="bold name" x="${middle(place)}" y="${TOP + 25}"` +
      `${hollow ? "" : ' style="fill:#fff"'}>${name(row)}</text>`;
  };

  // q and k have a scale each, so that a joined pair of any two rows fits its circle.
  const longest = (numbers) => Math.hypot(...numbers.map(Math.abs).sort((x, y) => y - x).slice(0, 2));
  const scale = { q: longest(head.q), k: longest(head.k) };
  const largest = Math.max(...LAYOUTS.flatMap((rows) => LAYOUTS.flatMap((rotation) =>
    run(rows, rotation, 0, 0).pairs.map(({ joined }) => [head.q, head.k].reduce(
      (size, x) => size * Math.hypot(...joined.map((row) => x[row])), 1)))));

  const circle = ({ joined, q, k, product }, i) => {
    const [x, y, radius] = [SLOT * (i + 0.5), TOP + 136, 40];
    // Names beyond the points, each on the side where the other point is not.
    const side = 5 * (Math.sign(q[0] * k[1] - q[1] * k[0]) || 1);
    const hand = (point, kind) => {
      const [dx, dy] = point.map((one) => (one / scale[kind]) * radius);
      const size = Math.hypot(dx, dy) || 1, away = kind === "q" ? side : -side;
      const [tx, ty] = [dx + (9 * dx + away * dy) / size, dy + (9 * dy - away * dx) / size];
      return `<line class="hand" x1="${x}" y1="${y}" x2="${x + dx}" y2="${y - dy}"/>` +
        `<circle class="dot ${kind}" cx="${x + dx}" cy="${y - dy}" r="4"/>` +
        `<text class="small" x="${x + tx}" y="${y - ty + 4}">${kind}</text>`;
    };
    const bar = (product / largest) * (SLOT / 2 - 6), foot = y + radius + 36;
    return `<text class="bold" x="${x}" y="${y - radius - 27}">${joined.map(name).join(" + ")}</text>` +
      `<text class="small" x="${x}" y="${y - radius - 10}">θ${low(i)} = ${head.speeds[i].toFixed(3)}</text>` +
      `<circle class="axis" cx="${x}" cy="${y}" r="${radius}"/>` +
      `<path class="axis" d="M${x - radius} ${y}h${2 * radius}M${x} ${y - radius}v${2 * radius}"/>` +
      hand(k, "k") + hand(q, "q") +
      `<text class="product" x="${x}" y="${y + radius + 28}">${number(product)}</text>` +
      `<rect class="bar" x="${x + Math.min(0, bar)}" y="${foot}" width="${Math.abs(bar)}" height="9"/>` +
      `<path class="axis" d="M${x} ${foot - 3}v15"/>`;
  };

  const describe = ({ rows, rotation, right, pairs, score }) =>
    `${rows} rows with the ${rotation} rotation, which joins ` +
    `${pairs.map(({ joined }) => joined.map(name).join(" and ")).join(", ")}: ` +
    `${right ? "partners" : "strangers"}. q × k per pair ` +
    `${pairs.map(({ product }) => number(product)).join(", ")}; sum ${number(score)}.`;

  const panel = (title, ran) =>
    `<h4>${title}</h4><svg class="${ran.right ? "right" : "wrong"}" role="img"` +
    ` aria-label="${describe(ran)}" viewBox="0 0 ${WIDTH} ${TOP + 262}">` +
    ran.pairs.map(arc).join("") + rowAt[ran.rows].map(cell).join("") +
    ran.pairs.map(circle).join("") +
    `<text x="${WIDTH / 2}" y="${TOP + 250}">q × k per pair, summed: ` +
    `<tspan class="bold score">${number(ran.score)}</tspan></text></svg>`;

  const answer = (ran, wanted, distance) => {
    const off = Math.abs(ran.score - wanted);
    if (ran.right) return ["right", "✓ right", `the rotation joins partners. Score ${number(ran.score)}.`];
    if (!distance) {
      return ["right", "✓ looks right", `the rotation joins strangers, but at distance 0 q and k are ` +
        `rotated alike: the score is ${number(ran.score)} all the same.`];
    }
    return ["wrong", "✗ wrong", `the rotation joins strangers; score off by ${number(off)}: ` +
      `${number(ran.score)} instead of ${number(wanted)}.`];
  };

  const radios = (key, chosen) => `<fieldset><legend>${key}</legend>` + LAYOUTS.map((layout) =>
    `<label><input type="radio" name="${key}" value="${layout}"${layout === chosen ? " checked" : ""}>` +
    ` ${layout}</label>`).join("") + "</fieldset>";
  const slider = (key, label, value) => `<label class="slider">${label}<br><input type="range"` +
    ` name="${key}" min="0" max="${head.most}" value="${value}"> <output>${value}</output></label>`;

  const root = host.attachShadow({ mode: "open" });
  root.innerHTML = `<style>${head.style}</style><form aria-label="Rows, rotation, position and distance">` +
    radios("rows", head.start.rows) + radios("rotation", head.start.rotation) +
    slider("position", "position of k", head.start.position) +
    slider("distance", "distance from k to q", head.start.distance) +
    `</form><p class="answer" role="status"></p><div class="panels"><section></section><section></section></div>` +
    `<table></table><p class="note">${head.note}</p>`;
  const form = root.querySelector("form");
  const [left, right] = root.querySelectorAll("section");

  const draw = () => {
    const { rows, rotation } = Object.fromEntries(new FormData(form));
    const [position, distance] = [form.position, form.distance].map((one) => one.valueAsNumber);
    const ran = run(rows, rotation, position, distance);
    const wanted = run("half_split", "half_split", position, distance);
    const [kind, badge, words] = answer(ran, wanted.score, distance);
    for (const one of [form.position, form.distance]) one.nextElementSibling.value = one.value;
    root.querySelector(".answer").innerHTML = `<b class="badge ${kind}">${badge}</b> ${words}`;
    left.innerHTML = panel("for comparison: half_split rows, half_split rotation", wanted);
    right.innerHTML = panel(`your choice: ${rows} rows, ${rotation} rotation`, ran);
    root.querySelector("table").innerHTML =
      `<caption>All four scores with k at ${position} and q at ${position + distance}</caption><tr><td></td>` +
      LAYOUTS.map((one) => `<th scope="col">${one} rotation</th>`).join("") + "</tr>" +
      LAYOUTS.map((one) => `<tr><th scope="row">${one} rows</th>` + LAYOUTS.map((other) => {
        const { score } = run(one, other, position, distance), same = one === other;
        const here = one === rows && other === rotation ? ' aria-current="true"' : "";
        const mark = same ? "✓" : distance ? "✗" : "=";
        return `<td class="${same || !distance ? "right" : "wrong"}"${here}` +
          ` data-score="${score}"><b>${mark}</b> ${number(score)}</td>`;
      }).join("") + "</tr>").join("");
  };
  form.addEventListener("input", draw);
  form.addEventListener("submit", (event) => event.preventDefault());
  draw();
})(document.currentScript.previousElementSibling, HEAD_JSON);
