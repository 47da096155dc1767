"""Original sample texts in English, Chinese and Python for the distance."""

PASSAGES = (
    # English
    "The lighthouse keeper wrote down the weather every evening, although nobody had asked for his notes in years. "
    "On the first of March the wind turned to the north-east, and by midnight the spray froze on the railing. He "
    "counted eleven ships before dawn, two more than on the day before, and noted that the last of them carried no "
    "flag. When the supply boat came on Thursday, the captain brought coffee, lamp oil and a letter from the harbour "
    "office. The letter said that an automatic lamp would be installed in autumn. He read it twice, folded it, and put "
    "it under the barometer, because the needle had begun to fall again and there was work to do before the storm.",
    "Bread dough rises because yeast turns sugar into carbon dioxide and alcohol. The gas is caught in a net of gluten, "
    "which forms if flour and water are kneaded for several minutes. Warm dough rises faster, but a slow rise in the "
    "refrigerator gives more flavour: bacteria then have time to produce acids. Too much salt slows the yeast down, and "
    "too little makes the dough sticky. Bakers press a finger into the dough to see if it is ready. If the dent comes "
    "back slowly, the loaf can go into the oven; if it springs back at once, another half hour is needed. In the first "
    "ten minutes of baking, steam keeps the crust soft so that the loaf can expand.",
    "A city council has to decide how to divide a fixed budget between a tram line and forty electric buses. The tram "
    "costs three times as much to build, yet it carries 220 passengers per vehicle and lasts for forty years. Buses can "
    "be bought within twelve months and change their routes if a new district grows. Opponents of the tram point to two "
    "years of road works in the centre. Its supporters answer that land prices along rails rise, which later brings "
    "taxes. The report recommends to begin with the buses, to reserve the corridor for rails, and to compare passenger "
    "numbers after five years before any contract is signed.",
    "Dear Ms Okafor, thank you for your order of 14 May. Unfortunately, the blue variant of the desk lamp is sold out, "
    "and our supplier cannot confirm a delivery before the end of next month. We can offer you the grey variant, which "
    "has the same bulb and the same two-year guarantee, at a discount of fifteen percent. If you prefer to wait, we will "
    "keep your order open without any charge; you may cancel it at any time by replying to this message. Please tell us "
    "until Friday which option suits you. The two shelves from the same order have already left our warehouse and should "
    "arrive tomorrow between nine and noon. Kind regards, Customer Service",
    # Chinese
    "清晨的菜市场总是最热闹的。卖豆腐的老王天不亮就推着车来了，摊位前排着几位熟客。他们一边挑选，一边谈论昨天夜里的大雨。"
    "河水涨了不少，桥边的小路被淹了一半，送菜的三轮车只好绕到东门。隔壁的李阿姨把新鲜的青菜摆得整整齐齐，还在每一把上洒了些水。"
    "有个背着书包的孩子跑过来，买了两个包子，又急急忙忙地往学校赶。太阳慢慢升起来，雾气散开，远处的山也看得清楚了。"
    "到了九点，人渐渐少了，老王收拾好东西，坐在小凳子上喝了一口热茶，心里盘算着明天要不要多做一板豆腐。",
    "光在真空中的速度大约是每秒三十万公里，从太阳到地球需要八分多钟。因此，我们看到的太阳其实是八分钟以前的样子。"
    "更远的恒星发出的光要走几年、几百年甚至更长的时间，所以天文学家常说，看得越远，就看得越早。望远镜收集的光越多，"
    "能看到的天体就越暗。把望远镜放到太空，可以避开大气的影响，图像会更加清晰。不过太空望远镜造价很高，维修也很困难，"
    "一旦镜片出现问题，往往要花费数年才能解决。地面上的大型望远镜则使用可以变形的镜面，每秒调整上千次，用来抵消空气的抖动。",
    "会议纪要：本次会议讨论了第三季度的生产计划。首先，采购部报告说，原材料价格比上个月上涨了百分之六，主要原因是运输费用增加。"
    "其次，生产部提出更换两台旧设备，预计投资一百二十万元，可以把每件产品的能耗降低百分之十五。财务部认为，应当先完成成本核算，"
    "再决定购买还是租赁。与会人员一致同意，由张工程师在本月二十日以前提交一份比较方案。最后，人事部通报了夏季的排班安排，"
    "要求各车间在周五之前上报名单。下次会议定于下月第一个星期二上午十点召开。",
    # Python and shell
    "import csv\nfrom collections import defaultdict\nfrom pathlib import Path\n\n\ndef totals_by_month(path: Path) -> "
    "dict[str, float]:\n    \"\"\"Sum the amounts of each month in a CSV file with the columns date and amount.\"\"\"\n"
    "    totals: dict[str, float] = defaultdict(float)\n    with path.open(newline=\"\") as file:\n        for row in "
    "csv.DictReader(file):\n            year, month, _ = row[\"date\"].split(\"-\")\n            totals[f\"{year}-"
    "{month}\"] += float(row[\"amount\"])\n    return dict(sorted(totals.items()))\n\n\nif __name__ == \"__main__\":\n"
    "    for month, total in totals_by_month(Path(\"sales.csv\")).items():\n        print(f\"{month}: {total:.2f}\")\n",
    "class Node:\n    def __init__(self, key, left=None, right=None):\n        self.key = key\n        self.left = left\n"
    "        self.right = right\n\n\ndef insert(root, key):\n    if root is None:\n        return Node(key)\n    if key < "
    "root.key:\n        root.left = insert(root.left, key)\n    elif key > root.key:\n        root.right = insert("
    "root.right, key)\n    return root\n\n\ndef in_order(root):\n    if root is not None:\n        yield from in_order("
    "root.left)\n        yield root.key\n        yield from in_order(root.right)\n\n\ndef height(root):\n    return 0 if "
    "root is None else 1 + max(height(root.left), height(root.right))\n",
    "SELECT c.name, COUNT(o.id) AS orders, SUM(o.total) AS revenue\nFROM customers AS c\nLEFT JOIN orders AS o ON "
    "o.customer_id = c.id\nWHERE c.country = 'NO' AND o.created_at >= '2024-01-01'\nGROUP BY c.name\nHAVING COUNT(o.id) "
    "> 3\nORDER BY revenue DESC\nLIMIT 20;\n\n-- The index keeps the join fast if the table of orders grows.\nCREATE "
    "INDEX IF NOT EXISTS orders_by_customer ON orders (customer_id, created_at);\n",
    # Tables
    "| Region | 2021 | 2022 | 2023 | Change |\n|---|---|---|---|---|\n| North | 412 | 455 | 501 | +10.1% |\n| South | "
    "388 | 371 | 402 | +8.4% |\n| East | 297 | 310 | 298 | -3.9% |\n| West | 505 | 540 | 612 | +13.3% |\n| Total | 1602 "
    "| 1676 | 1813 | +8.2% |\n\nThe table shows the number of new contracts. The west grew fastest in 2023, while the "
    "east lost twelve contracts compared with the year before. Over all regions, the number rose from 1,676 to 1,813.",
    "| 型号 | 屏幕 | 电池 | 价格（元） |\n|---|---|---|---|\n| A1 | 6.1 英寸 | 4000 mAh | 2499 |\n| A1 Pro | 6.5 英寸 | 4800 mAh "
    "| 3299 |\n| B2 | 5.8 英寸 | 3600 mAh | 1899 |\n| B2 Max | 6.7 英寸 | 5000 mAh | 2799 |\n\n从表中可以看出，B2 的价格最低，"
    "但屏幕和电池也最小。如果更看重续航，B2 Max 的电池容量最大，价格比 A1 Pro 便宜五百元。",
)  # fmt: skip
