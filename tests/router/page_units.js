// The page's pure functions, called in the browser: test_page.py looks at what they gave.
async () => {
  const [{ phases, stateOf, words }, { EventParser }, { calculate, run, TOOLS }, { ceiling }, { joinCalls }, { duration, worker }] =
    await Promise.all(["phases", "feed", "tools", "charts", "chat", "dom"].map((name) => import(`/page/${name}.js`)));
  const found = {};
  const note = (at_ms, kind, more = {}) => ({ at_ms, kind, choice: 0, worker: "", to: "", detail: "", ...more });
  const request = (notes, more = {}) => ({ notes, ended_ms: null, age_ms: 100, outcome: "", ...more });
  const bars = (one) => phases(one).map((bar) => [bar.phase, bar.from_ms, bar.to_ms, bar.worker]);
  found.plain = bars(request([note(1, "submitted", { worker: "a" }), note(20, "first_token"), note(90, "ended")], { ended_ms: 90 }));
  found.legs = bars(request([note(1, "prefill", { worker: "p", to: "d" }), note(5, "offered"), note(20, "first_token"), note(30, "handed_over", { worker: "p", to: "d" })]));
  found.moved = bars(request([note(1, "submitted", { worker: "a" }), note(20, "first_token"), note(40, "moved", { worker: "a" }), note(41, "parked"), note(60, "submitted", { worker: "b" })]));
  found.waited = bars(request([note(1, "submitted", { worker: "a" }), note(10, "started"), note(20, "first_token")]));
  found.other = bars(request([note(1, "submitted", { worker: "a", choice: 1 })]));
  found.fresh = bars(request([], { age_ms: 0 }));
  found.states = [stateOf(request([note(1, "submitted")])), stateOf(request([], { ended_ms: 1, outcome: "unavailable" })), stateOf(request([], { ended_ms: 1, outcome: "stop" }))];
  found.words = words(note(1, "moved", { worker: "unix:/x/w-1.sock", detail: "drain" }));

  const stream = "event: a\ndata: 1\n\n: ping\r\n\r\ndata:  two\ndata: 2\r\rdata: 3\n\n";
  const whole = [];
  new EventParser((event) => whole.push(event)).push(stream);
  found.events = whole;
  found.splits = 0;
  for (let i = 0; i <= stream.length; i++) for (let j = i; j <= stream.length; j++) {
    const seen = [];
    const parser = new EventParser((event) => seen.push(event));
    for (const piece of [stream.slice(0, i), stream.slice(i, j), stream.slice(j)]) parser.push(piece);
    if (JSON.stringify(seen) !== JSON.stringify(whole)) found.splits++;
  }
  found.sums = ["2 * (3 + 4)", "7 / 2", "-3 + 1", "1 / 0", "alert(1)", "2 **", "", "9 9", "(".repeat(5000), "1e400", "999999999999999 * 99"].map(calculate);
  found.tools = [run("read_file", '{"path": "./notes.txt"}'), run("read_file", '{"path": "__proto__"}'), run("list_files", '{"path": "."}'), run("list_files", '{"path": "src/"}'), run("nothing", '{"path": ""}'), run("calculator", "{"), run("read_file", '{"path": 3}'), run("read_file", "null")];
  found.names = TOOLS.map((tool) => tool.function.name);
  found.tops = [0, 0.7, 1, 3, 12, 99, 101, 26000].map(ceiling);
  found.calls = joinCalls([], [{ index: 0, id: "a", function: { name: "f", arguments: "{" } }, { index: 1, id: "b", function: { name: "g" } }, { index: 0, function: { arguments: "}" } }, { index: -1 }, { index: 1e9 }]);
  found.durations = [0.84, 850, 2400, 185000, null].map(duration);
  found.workers = [worker("unix:/run/a/w-0.sock"), worker("10.0.0.1:70")];
  return found;
}