// The waiting queue: fair between tenants, first come first served within one, in the order of classes' walks.
#include <map>
#include <random>

#include "check.hpp"
#include "tokenrelay/scheduler/waiting.hpp"

using namespace tokenrelay::scheduler;

namespace {

/// A queue whose sequences are admitted one by one, each costing some tokens.
struct Desk {
  explicit Desk(std::size_t sequences) : links(sequences), ranks(sequences), tokens(sequences), places(sequences) {
    for (auto i = static_cast<SequenceIndex>(sequences); i-- > 0;) vacant.push_back(i);
  }
  ~Desk() {
    for (std::size_t i = 0; i < places.size(); ++i) {
      if (places[i]) leave(static_cast<SequenceIndex>(i));
    }
  }
  Desk(const Desk&) = delete;
  Desk& operator=(const Desk&) = delete;

  SequenceIndex submit(std::uint64_t tenant, double cost, int priority_class = 16) {
    const SequenceIndex index = vacant.back();
    vacant.pop_back();
    const auto at = static_cast<std::size_t>(index);
    ranks[at] = {priority_class, ++tickets};
    tokens[at] = cost;
    tenant_of[index] = tenant;
    queue.welcome(index, tenant * 64 + static_cast<std::uint64_t>(priority_class));
    places[at].emplace(queue.enter(index));
    return index;
  }
  void leave(SequenceIndex index) {
    auto& place = places[static_cast<std::size_t>(index)];
    queue.leave(std::move(*place));
    place.reset();
    queue.dismiss(index);
    vacant.push_back(index);
  }
  void admit(SequenceIndex index) {
    queue.served(index, tokens[static_cast<std::size_t>(index)], true);
    served[tenant_of[index]] += tokens[static_cast<std::size_t>(index)];
    leave(index);
  }
  /// The next one of the class is admitted; `no_sequence` if nobody waits.
  SequenceIndex admit_next(int priority_class = 16) {
    WaitingWalk walk(queue, priority_class);
    const SequenceIndex index = walk.next();
    if (index != no_sequence) admit(index);
    return index;
  }
  void verify() const {
    const auto broken = queue.check();
    if (broken) check::fail(__FILE__, __LINE__, *broken);
  }

  Links links;
  Ranks ranks;
  WaitingQueue queue{links, ranks, 200};
  std::vector<double> tokens;
  std::vector<std::optional<WaitingQueue::Token>> places;
  std::vector<SequenceIndex> vacant;
  std::map<SequenceIndex, std::uint64_t> tenant_of;
  std::map<std::uint64_t, double> served;
  std::uint64_t tickets = 0;
};

}  // namespace

TEST(one_tenant_is_served_in_order) {
  Desk desk(8);
  for (int i = 0; i < 5; ++i) desk.submit(1, 100.0 * i);
  std::uint64_t last = 0;
  for (int i = 0; i < 5; ++i) {
    const SequenceIndex index = desk.admit_next();
    CHECK(desk.ranks[static_cast<std::size_t>(index)].ticket > last);
    last = desk.ranks[static_cast<std::size_t>(index)].ticket;
  }
  CHECK_EQUAL(desk.admit_next(), no_sequence);
}

TEST(a_tenant_that_asks_for_little_is_not_behind_one_that_asks_for_much) {
  Desk desk(64);
  for (int i = 0; i < 40; ++i) desk.submit(1, 1000);
  for (int i = 0; i < 5; ++i) desk.admit_next();
  desk.submit(2, 100);
  desk.submit(2, 100);
  int before = 0;
  while (desk.served[2] < 200) before += desk.tenant_of[desk.admit_next()] == 1;
  CHECK(before <= 2);
}

TEST(shares_are_equal_in_tokens_whatever_the_requests_sizes) {
  Desk desk(64);
  std::mt19937_64 random(1);
  const std::map<std::uint64_t, int> size{{1, 50}, {2, 500}, {3, 2000}};
  std::map<std::uint64_t, int> waiting;
  for (int i = 0; i < 4000; ++i) {
    for (const auto& [tenant, mean] : size) {
      while (waiting[tenant] < 10) {
        desk.submit(tenant, 1 + static_cast<double>(random() % static_cast<unsigned>(2 * mean)));
        ++waiting[tenant];
      }
    }
    --waiting[desk.tenant_of[desk.admit_next()]];
    desk.verify();
  }
  for (const auto& [tenant, mean] : size) CHECK(std::abs(desk.served[tenant] / desk.served[1] - 1) < 0.05);
}

TEST(tenants_that_come_newly_all_the_time_pass_nobody_for_ever) {
  Desk desk(64);
  for (int i = 0; i < 20; ++i) desk.submit(1, 1000);
  for (int i = 0; i < 10; ++i) desk.admit_next();  // it was served much while nobody else was there
  std::uint64_t tenant = 100;
  int passed = 0;
  const double before = desk.served[1];
  for (int i = 0; i < 3; ++i) desk.submit(++tenant, 100);
  while (desk.served[1] == before && passed < 1000) {
    desk.admit_next();
    desk.submit(++tenant, 100);
    ++passed;
    desk.verify();
  }
  CHECK(passed < 100);
}

TEST(a_tenant_is_passed_by_so_many_admissions_at_most) {
  Desk desk(256);
  desk.submit(1, 1e6);
  desk.admit_next();
  desk.submit(1, 1e6);
  std::uint64_t tenant = 100;
  for (int i = 0; i < 200; ++i) desk.submit(++tenant, 1);  // more come than go: the clock stands almost still
  int passed = 0;
  while (desk.served[1] < 2e6 && passed < 1000) {
    desk.admit_next();
    desk.submit(++tenant, 1);
    ++passed;
  }
  CHECK_EQUAL(passed, 201);
}

TEST(nobody_saves_up_service) {
  Desk desk(64);
  desk.submit(1, 100);
  desk.admit_next();
  for (int i = 0; i < 30; ++i) desk.submit(2, 1000);
  for (int i = 0; i < 20; ++i) desk.admit_next();  // the first one was away meanwhile
  for (int i = 0; i < 10; ++i) desk.submit(1, 1000);
  const double before = desk.served[2];
  for (int i = 0; i < 6; ++i) desk.admit_next();
  CHECK(desk.served[2] - before >= 2000);
}

TEST(a_blocked_tenant_does_not_keep_others_out) {
  Desk desk(16);
  for (int i = 0; i < 3; ++i) desk.submit(1, 10);
  const SequenceIndex second = desk.submit(2, 10);
  WaitingWalk walk(desk.queue, 16);
  CHECK_EQUAL(desk.tenant_of[walk.next()], 1U);
  walk.blocked();
  CHECK_EQUAL(walk.next(), second);
  walk.blocked();
  CHECK_EQUAL(desk.tenant_of[walk.next()], 1U);  // the next of the first one
  walk.blocked();
  CHECK_EQUAL(desk.tenant_of[walk.next()], 1U);
  CHECK_EQUAL(walk.next(), no_sequence);
}

TEST(whoever_comes_back_goes_before_other_tenants_and_behind_its_own) {
  Desk desk(16);
  const SequenceIndex older = desk.submit(1, 10);
  const SequenceIndex back = desk.submit(1, 10);
  const SequenceIndex other = desk.submit(2, 10);
  auto& place = desk.places[static_cast<std::size_t>(back)];
  desk.queue.leave(std::move(*place));
  place.reset();
  place.emplace(desk.queue.reenter(back));
  desk.verify();
  CHECK_EQUAL(desk.admit_next(), older);
  CHECK_EQUAL(desk.admit_next(), back);
  CHECK_EQUAL(desk.admit_next(), other);
}

TEST(many_tenants_come_and_go) {
  Desk desk(200);
  std::mt19937_64 random(5);
  for (int i = 0; i < 20000; ++i) {
    if (!desk.vacant.empty() && random() % 2 == 0) {
      desk.submit(random() % 3000, static_cast<double>(random() % 100), static_cast<int>(random() % 3));
    } else if (random() % 4 == 0) {
      const auto at = random() % desk.places.size();
      if (desk.places[at]) desk.leave(static_cast<SequenceIndex>(at));
    } else {
      desk.admit_next(static_cast<int>(random() % 3));
    }
    if (i % 50 == 0) desk.verify();
  }
}

CHECK_MAIN
